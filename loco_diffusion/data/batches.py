"""Which pictures are in which batch of which process: a function of the seed and the batch's number alone.

All pictures of a batch are of one bucket, that is of one size, and in every step all processes take the same
bucket, so that none waits for another. A process that continues a run asks for the number of its next batch and
gets what an uninterrupted run would have got: at once from a source with an index, and from a stream by reading
it anew up to there, without decoding pictures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from threading import Lock
from typing import Protocol, TypeAlias

import numpy as np

from loco_diffusion.data.framing import Framing
from loco_diffusion.data.hub import StreamSource
from loco_diffusion.data.sources import Record
from loco_diffusion.errors import UserError

Processes: TypeAlias = tuple[int, int]
"""The number of this process, and how many there are."""

_ORDER, _BUCKETS = 1, 3  # keep random streams of one seed apart; the trainer's draws are 2


class Batches(Protocol):
    """The batches of one process."""

    def batch(self, number: int) -> tuple[int, list[int] | list[Record]]:
        """A batch (0-based): its bucket, and its pictures as indices of the source, or as records of a stream.

        Raises:
            UserError: a stream cannot be read.
        """


class ShuffledBatches:
    """Batches of a source with an index: a new permutation of each bucket for every epoch.

    Batches run on from one epoch of a bucket into the next, so all have the same size, even one larger than the
    bucket. Buckets take turns at random, in proportion to their pictures.

    Args:
        buckets: indices of the pictures of each bucket, at least one for each process or none at all.
        seed: of the order.
        size: of a batch.
        process: takes every n-th picture of each bucket.

    Attributes:
        members: the buckets, of this process' pictures only.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], seed: int, size: int, process: Processes) -> None:
        self.buckets = buckets
        self.counts = tuple(len(bucket) for bucket in buckets)
        self.members = [bucket[process[0] :: process[1]] for bucket in buckets]
        self.seed = seed
        self.size = size
        self.process = process[0]

    def batch(self, number: int) -> tuple[int, list[int]]:
        """See `Batches`."""
        bucket, turn = _turn(self.seed, number, self.counts)
        members = self.members[bucket]
        epochs_and_places = (
            divmod(place, len(members)) for place in range(turn * self.size, (turn + 1) * self.size)
        )
        return bucket, [
            members[_permutation(self.seed, epoch, self.process, len(members))[place]]
            for epoch, place in epochs_and_places
        ]


class StreamedBatches:
    """Batches of a stream, of which every process reads all and uses its part.

    Pictures wait until there are enough of a bucket for a batch of each process, also from one epoch to the next.

    Args:
        source: the stream.
        framing: tells the buckets.
        seed: of the order.
        size: of a batch.
        process: takes its part of the pictures of each step.
    """

    def __init__(
        self, source: StreamSource, framing: Framing, seed: int, size: int, process: Processes
    ) -> None:
        self.source = source
        self.framing = framing
        self.seed = seed
        self.size = size
        self.process = process
        self._next = 0
        self._batches = self._all()
        self._last: tuple[int, list[Record]] | None = None
        self._reading = Lock()  # an adapter that is fitted to gradients asks while batches are read ahead

    def batch(self, number: int) -> tuple[int, list[Record]]:
        """See `Batches`; a batch before the last one that was asked for makes the stream start again."""
        with self._reading:
            if number < self._next - 1:
                self._next, self._batches = 0, self._all()
            while self._next <= number:
                self._last = next(self._batches)
                self._next += 1
            assert self._last is not None
            return self._last

    def _all(self) -> Iterator[tuple[int, list[Record]]]:
        waiting: list[deque[Record]] = [deque() for _ in self.framing.sizes]
        place, processes = self.process
        for epoch in count():
            empty = True
            for record in self.source.records(self.seed, epoch):
                empty = False
                bucket = self.framing.bucket(record.size()) if len(waiting) > 1 else 0
                waiting[bucket].append(record)
                if len(waiting[bucket]) == self.size * processes:
                    yield bucket, list(waiting[bucket])[place::processes]
                    waiting[bucket].clear()
            if empty:
                raise UserError(f"The data set {self.source.name} gives no more pictures; check it.")


def sort_into_buckets(sizes: Sequence[tuple[int, int]], framing: Framing, processes: int) -> list[list[int]]:
    """Indices of the pictures of each bucket.

    A bucket with fewer pictures than processes stays empty; its pictures go to the nearest one that has enough, or
    all to the first if none has.

    Args:
        sizes: of all pictures.
        framing: tells the buckets.
        processes: how many there are.
    """
    nearest = [framing.bucket(size) for size in sizes]
    counts = np.bincount(nearest, minlength=len(framing.sizes))
    large = [number for number, found in enumerate(counts) if found >= processes] or [0]
    fallback = Framing(tuple(framing.sizes[number] for number in large))
    buckets: list[list[int]] = [[] for _ in framing.sizes]
    for index, (bucket, size) in enumerate(zip(nearest, sizes, strict=True)):
        buckets[bucket if bucket in large else large[fallback.bucket(size)]].append(index)
    return buckets


def _turn(seed: int, number: int, counts: tuple[int, ...]) -> tuple[int, int]:
    """The bucket whose turn it is in a batch, and how many turns it had before."""
    if len(counts) == 1:
        return 0, number
    cycle, place = divmod(number, sum(counts))
    order = _turns(seed, cycle, counts)
    bucket = int(order[place])
    return bucket, cycle * counts[bucket] + int((order[:place] == bucket).sum())


@lru_cache(maxsize=2)
def _turns(seed: int, cycle: int, counts: tuple[int, ...]) -> np.ndarray:
    """One turn for each picture: after a cycle all pictures were used equally often."""
    turns = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    return np.random.default_rng([seed, _BUCKETS, cycle]).permutation(turns)


@lru_cache(maxsize=32)
def _permutation(seed: int, epoch: int, process: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch, process]).permutation(count)
