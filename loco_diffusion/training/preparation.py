"""Computing once what does not change from epoch to epoch: text embeddings, latents, condition maps.

What is computed lies in memory if that of all pictures fits there, or in a folder, see `cache`. Pictures that
are cropped or flipped at random are read and encoded in every step, and their text embeddings still once; of a
stream nothing is kept.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from loco_diffusion.data.batches import ShuffledBatches
from loco_diffusion.data.hub import StreamSource
from loco_diffusion.data.sources import Source, digest
from loco_diffusion.errors import UserError
from loco_diffusion.training.cache import (
    Cache,
    cache_folder,
    model_identity,
    tensor_identity,
    tokenizer_identity,
)
from loco_diffusion.training.examples import Caches, Examples, Read

_AT_ONCE = 16  # pictures or captions that a model encodes
_PARTS_AHEAD = 2  # as many pictures each


def prepare(examples: Examples, progress: Progress) -> None:
    """Fill the caches of examples, as far as there is room for them.

    With a folder, every process writes a part of them: all must have come back from here before the first batch.

    Raises:
        UserError: a picture cannot be read, a latent is not finite, or a cache cannot be written.
    """
    source, batches, config = examples.source, examples.batches, examples.config
    if isinstance(source, StreamSource) or not isinstance(batches, ShuffledBatches):
        return
    on_disk = config.cache_folder is not None
    buckets = batches.buckets if on_disk else batches.members
    room = math.inf if on_disk else config.cache_gigabytes * 1e9
    pictures = sum(len(bucket) for bucket in buckets)
    text_bytes, pixel_bytes = _bytes_of_one(examples)
    text = latents = maps = None
    if text_bytes * pictures <= room:
        room -= text_bytes * pictures
        text = Cache([sorted(index for bucket in buckets for index in bucket)])
        if config.cache_folder is not None:
            text.folder = cache_folder(config.cache_folder, "text", _text_key(examples, source))
        _fill_text(text, source, examples, progress)
    if pixel_bytes * pictures <= room and not examples.framing.random:
        latents, maps = Cache(buckets), Cache(buckets)
        if config.cache_folder is not None:
            latents_key, maps_key = _pixel_keys(examples, source, buckets)
            latents.folder = cache_folder(config.cache_folder, "latents", latents_key)
            maps.folder = cache_folder(config.cache_folder, examples.map_kind, maps_key)
        _fill_pixels(latents, maps, source, examples, progress)
    examples.caches = Caches(text, latents, maps)


def _bytes_of_one(examples: Examples) -> tuple[int, int]:
    """What one picture takes: its text, and its latents and map."""
    encoding, latents = examples.encoding, examples.first_latents.nbytes
    text = sum(encoding.empty_text[name].nbytes for name in encoding.per_prompt)
    return text, latents + (latents if examples.map_kind == "tokens" else examples.first.picture.nbytes)


def _missing(cache: Cache, examples: Examples) -> list[int]:
    """The chunks that this process has to compute."""
    place, processes = examples.process if cache.folder else (0, 1)
    return [number for number in range(place, len(cache.chunks), processes) if number not in cache]


def _fill_text(cache: Cache, source: Source, examples: Examples, progress: Progress) -> None:
    encoding, missing = examples.encoding, _missing(cache, examples)
    task = progress.add_task(
        "Encoding captions", total=sum(len(cache.chunks[number]) for number in missing), note=""
    )
    for number in missing:
        parts = []
        for indices in _in_parts(cache.chunks[number]):
            text = encoding.text([source[index].caption for index in indices])
            parts.append({name: text[name].cpu() for name in encoding.per_prompt})
            progress.advance(task, len(indices))
        cache.put(number, {name: torch.cat([part[name] for part in parts]) for name in encoding.per_prompt})


def _fill_pixels(latents: Cache, maps: Cache, source: Source, examples: Examples, progress: Progress) -> None:
    missing = sorted({*_missing(latents, examples), *_missing(maps, examples)})
    task = progress.add_task(
        "Preparing pictures", total=sum(len(latents.chunks[number]) for number in missing), note=""
    )
    read = _read_ahead(latents, missing, source, examples)
    for number, parts in groupby(read, key=lambda part: part[0]):
        lacks_latents, lacks_maps = number not in latents, number not in maps
        new_latents, new_maps = [], []
        for _, pictures, found in parts:
            if lacks_latents:
                new_latents.append(examples.encoding.pictures(pictures).cpu())
            if lacks_maps:
                new_maps.append(_kept(examples, pictures, found))
            progress.advance(task, len(pictures))
        if not all(bool(part.isfinite().all()) for part in new_latents):
            raise UserError("The VAE gives NaN or infinity; use dtype float32 or bfloat16.")
        if lacks_latents:
            latents.put(number, {"latents": torch.cat(new_latents)})
        if lacks_maps:
            maps.put(number, {examples.map_kind: torch.cat(new_maps)})


def _kept(examples: Examples, pictures: Tensor, maps: Tensor) -> Tensor:
    """What is kept of maps, see `Examples.map_kind`."""
    if examples.map_kind == "pictures":
        return pictures
    return maps if examples.map_kind == "maps" else examples.encoding.maps(maps).tokens.cpu()


def _read_ahead(
    cache: Cache, chunks: Sequence[int], source: Source, examples: Examples
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Numbers of chunks, with a few of their pictures and maps; the pool reads on while the models encode."""

    def read(index: int, bucket: int) -> Read:
        record = source[index]
        example = examples.read(record, bucket, np.random.default_rng(0))
        if example.drawn and examples.map_kind != "pictures":
            raise UserError(
                f"The condition {examples.condition.name} draws random numbers for {record.name}, but not for "
                "every picture; let it draw one for each."
            )
        return example

    def stacked(number: int, examples_of_part: Iterable[Read]) -> tuple[int, Tensor, Tensor]:
        pictures, maps, _ = zip(*examples_of_part, strict=True)
        return number, torch.stack(pictures), torch.stack(maps)

    waiting: deque[tuple[int, Iterator[Read]]] = deque()
    for number in chunks:
        for indices in _in_parts(cache.chunks[number]):
            waiting.append((number, examples.pool.map(read, indices, [cache.buckets[number]] * len(indices))))
            if len(waiting) > _PARTS_AHEAD:
                yield stacked(*waiting.popleft())
    for part in waiting:
        yield stacked(*part)


def _in_parts(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    return (indices[start : start + _AT_ONCE] for start in range(0, len(indices), _AT_ONCE))


def _text_key(examples: Examples, source: Source) -> dict[str, Any]:
    """All that text embeddings depend on."""
    encoding = examples.encoding
    return {
        "captions": source.identity("captions"),
        "first": source[0].caption,  # changes with the code that makes captions
        "encoders": {name: model_identity(part) for name, part in encoding.text_encoders.items()},
        "tokenizers": tokenizer_identity(encoding.pipe),
        "shapes": {name: list(values.shape) for name, values in encoding.empty_text.items()},
    }


def _pixel_keys(
    examples: Examples, source: Source, buckets: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that latents and that maps depend on."""
    encoding, first = examples.encoding, examples.first
    pictures = {
        "pictures": source.identity("pictures"),
        "first": tensor_identity(first.picture),  # changes with the code that draws, decodes and resizes
        "sizes": examples.framing.sizes,
        "order": digest(str(bucket) for bucket in buckets),
    }
    latents = {**pictures, "vae": model_identity(encoding.pipe.vae)}
    if examples.map_kind == "pictures":
        return latents, pictures
    given = source[0].read_map is not None
    maps: dict[str, Any] = {
        **pictures,
        "condition": encoding.condition if given else repr(examples.condition),
        "maps": source.identity("maps") if given else "extracted",
        "first map": tensor_identity(first.map),
    }
    if examples.map_kind == "tokens":
        tokens = encoding.maps(first.map[None]).tokens
        maps |= {"vae": latents["vae"], "stride": encoding.stride, "shape": list(tokens.shape)}
    return latents, maps
