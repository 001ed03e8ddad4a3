"""Which pictures are in which batch: everything once an epoch, disjoint, one size, and the same after a restart."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loco_diffusion.data.batches import ShuffledBatches, StreamedBatches, sort_into_buckets
from loco_diffusion.data.framing import Framing
from loco_diffusion.data.sources import Record
from loco_diffusion.errors import UserError

FRAMING = Framing(((4, 4), (6, 3), (3, 6)))


class _Stream:
    """A stream of a few pictures of several shapes, in a new order each epoch; the caption is the number."""

    name = "few"

    def __init__(self, count: int) -> None:
        self.count = count

    def records(self, seed: int, epoch: int) -> Iterator[Record]:
        for number in np.random.default_rng([seed, epoch]).permutation(self.count):
            size = (20, 20) if number % 3 else (30, 15)
            yield Record("", str(number), lambda size=size: Image.new("RGB", size))


def _streamed(count: int, **changed: Any) -> StreamedBatches:
    arguments: dict[str, Any] = {"framing": FRAMING, "seed": 0, "size": 4, "process": (0, 1)}
    source: Any = _Stream(count)
    return StreamedBatches(source, **{**arguments, **changed})


def _captions(batch: tuple[int, list[Record]]) -> list[str]:
    return [record.caption for record in batch[1]]


def test_every_epoch_sees_every_picture_once_in_a_new_order() -> None:
    batches = ShuffledBatches([range(15)], 0, 4, (1, 2))  # the odd ones, of which there are 7
    drawn = [index for number in range(7) for index in batches.batch(number)[1]]
    epochs = [drawn[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(1, 15, 2)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ShuffledBatches([range(15)], 0, 20, (1, 2)).batch(0)[1][:4] == drawn[:4]  # larger than the data


def test_buckets_take_turns_in_proportion_and_together() -> None:
    buckets = [range(0, 10), range(10, 12), range(12, 36)]
    processes = [ShuffledBatches(buckets, 3, 4, (number, 2)) for number in range(2)]
    seen = [Counter[int](), Counter[int]()]
    for number in range(36):  # a cycle: each bucket has as many turns as pictures
        drawn = [process.batch(number) for process in processes]
        assert drawn[0][0] == drawn[1][0]  # all processes take the same bucket
        for process, (bucket, indices) in enumerate(drawn):
            assert len(indices) == 4 and set(indices) <= set(buckets[bucket])
            seen[process].update(indices)
    assert set(seen[0]).isdisjoint(seen[1]) and set(seen[0] | seen[1]) == set(range(36))
    assert {index: seen[0][index] + seen[1][index] for index in range(36)} == dict.fromkeys(range(36), 8)
    assert len({processes[0].batch(number)[0] for number in range(10)}) > 1  # in a random order
    again = ShuffledBatches(buckets, 3, 4, (1, 2))
    assert all(again.batch(number) == processes[1].batch(number) for number in (35, 7, 40, 0))
    assert any(ShuffledBatches(buckets, 4, 4, (1, 2)).batch(n) != processes[1].batch(n) for n in range(4))


def test_small_buckets_go_to_their_neighbours() -> None:
    sizes = [(20, 20)] * 4 + [(40, 20)] * 2 + [(20, 40)] + [(20, 19)]
    assert sort_into_buckets(sizes, FRAMING, 1) == [[0, 1, 2, 3, 7], [4, 5], [6]]
    assert sort_into_buckets(sizes, FRAMING, 2) == [[0, 1, 2, 3, 6, 7], [4, 5], []]
    assert sort_into_buckets(sizes, FRAMING, 8) == [list(range(8)), [], []]


def test_streamed_batches_have_one_size_and_lose_nothing() -> None:
    batches = _streamed(24)
    seen = Counter[str]()
    for number in range(12):
        bucket, records = batches.batch(number)
        assert len(records) == 4 and {FRAMING.bucket(record.size()) for record in records} == {bucket}
        seen.update(record.caption for record in records)
    assert set(seen) == {str(number) for number in range(24)} and max(seen.values()) <= 3


def test_streamed_batches_are_the_same_after_a_restart() -> None:
    batches = _streamed(10)
    expected = [_captions(batches.batch(number)) for number in range(9)]
    for number in (6, 6, 8, 0, 1):  # twice, ahead, and back
        assert _captions(batches.batch(number)) == expected[number]
    assert _captions(_streamed(10).batch(8)) == expected[8]
    assert [_captions(_streamed(10, seed=1).batch(number)) for number in range(9)] != expected


def test_processes_share_a_stream() -> None:
    one = _streamed(32, size=4)
    two = [_streamed(32, size=2, process=(number, 2)) for number in range(2)]
    for number, _ in itertools.product(range(5), range(2)):
        bucket, records = one.batch(number)
        halves = [process.batch(number) for process in two]
        assert [half[0] for half in halves] == [bucket, bucket]
        captions = [_captions(half) for half in halves]
        assert set(captions[0]).isdisjoint(captions[1])
        assert sorted(sum(captions, [])) == sorted(record.caption for record in records)


def test_an_empty_stream_is_no_endless_loop() -> None:
    with pytest.raises(UserError, match="gives no more pictures"):
        _streamed(0).batch(0)
