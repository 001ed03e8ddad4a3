"""Training examples: pictures, captions and condition maps as the tensors that a training step reads.

The work of a batch is split in two. `Examples.load` does what the processor does (drawing random numbers,
reading pictures, extracting maps) and may run in another thread while a step trains; `Examples.encode` does
what the models do. What does not change from epoch to epoch is computed once, if it fits into memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from loco_diffusion.conditions import Condition
from loco_diffusion.control import MapTokens, map_tokens, resize_map
from loco_diffusion.data.sources import Source
from loco_diffusion.errors import UserError
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.schedules import sample_sigmas

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from loco_diffusion.control.family import Family

_CHUNK = 16  # pictures encoded at once, when all are prepared


@dataclass
class Loaded:
    """A batch of B examples before the models have seen it; `latents` and `text` only if they are cached.

    Attributes:
        maps: condition maps, uint8 (B, 3, H, W), or their tokens where these are cached.
        keep: rows whose map is not dropped, bool (B,).
        sigmas: noise levels, float32 (B,) in [0, 1].
        noise: float32, as the latents (B, C, h, w).
        pictures: uint8 (B, 3, H, W), and captions, "" where dropped: if not cached.
    """

    maps: Tensor | MapTokens
    keep: Tensor
    sigmas: Tensor
    noise: Tensor
    latents: Tensor | None = None
    text: dict[str, Tensor] | None = None
    pictures: Tensor | None = None
    captions: list[str] | None = None


@dataclass
class Batch:
    """A batch of B examples on the training device.

    Attributes:
        latents: normalised, (B, C, h, w), float32.
        text: what the family's `encode_prompts` gives.
        maps: condition maps as the adapter's encoder reads them.
        keep, sigmas, noise: as in `Loaded`.
    """

    latents: Tensor
    text: dict[str, Tensor]
    maps: MapTokens
    keep: Tensor
    sigmas: Tensor
    noise: Tensor


@dataclass
class _Cache:
    """Tensors of all examples of this process, in the order of its shard.

    Either `maps` (uint8, or the tokens of an encoder that reads latents) or `pictures` (uint8) is there: where
    a condition draws random numbers, the pictures are kept and the maps made anew in every batch, or each
    picture would always come with the same hole or blur.
    """

    latents: Tensor
    text: dict[str, Tensor]
    maps: Tensor | MapTokens | None
    pictures: Tensor | None


class Examples:
    """The examples of one process.

    Args:
        config: the run.
        source: all pictures.
        condition: makes the maps.
        family: of the pipeline.
        pipe: whose VAE and text encoders are used, on `device`.
        device: where batches go.
        process: this process and how many there are; each uses every n-th picture.
    """

    def __init__(
        self,
        config: TrainingConfig,
        source: Source,
        condition: Condition,
        family: Family,
        pipe: DiffusionPipeline,
        device: torch.device,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        if process[1] > len(source):
            raise UserError(f"{len(source)} pictures are too few for {process[1]} processes; add pictures.")
        self.config = config
        self.source = source
        self.condition = condition
        self.timesteps = config.timesteps.resolved(family.flow)
        self.family = family
        self.pipe = pipe
        self.device = device
        self.shard = range(process[0], len(source), process[1])
        self.pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // process[1]))
        self._cache: _Cache | None = None
        self._first = source.picture(self.shard[0])
        self._empty_text = self._encode_text([""])
        self._latents_of_one, self._bytes_of_one = self._measure()

    @property
    def cached(self) -> bool:
        """Whether what does not change from epoch to epoch is in memory."""
        return self._cache is not None

    @property
    def needs_models(self) -> bool:
        """Whether VAE or text encoders are needed in every step."""
        if self._cache is None:
            return True
        return self._reads_latents and not isinstance(self._cache.maps, MapTokens)

    @property
    def fits_into_memory(self) -> bool:
        """Whether the examples of this process take no more than `cache_gigabytes`."""
        return self._bytes_of_one * len(self.shard) <= self.config.cache_gigabytes * 1e9

    def prepare(self, progress: Progress) -> None:
        """Compute everything that does not change from epoch to epoch, if it fits into memory.

        Raises:
            UserError: a picture cannot be read, or a latent is not finite.
        """
        if not self.fits_into_memory:
            return
        task = progress.add_task("Preparing pictures", total=len(self.shard), note="")
        latents: list[Tensor] = []
        texts: list[dict[str, Tensor]] = []
        pictures = torch.empty(len(self.shard), *self._first.shape, dtype=torch.uint8)
        maps = torch.empty_like(pictures)
        tokens: list[Tensor] = []
        random = False
        # The pool reads on while the models encode.
        read = self.pool.map(self._read, self.shard, np.random.default_rng(0).spawn(len(self.shard)))
        for start in range(0, len(self.shard), _CHUNK):
            rows = range(start, min(start + _CHUNK, len(self.shard)))
            for row, (picture, found, drawn) in zip(rows, read, strict=False):  # `read` goes on later
                pictures[row], maps[row] = picture, found
                random = random or drawn
            latents.append(self._encode_pictures(pictures[start : rows.stop]).cpu())
            texts.append(self._encode_text([self.source.caption(self.shard[row]) for row in rows]))
            if self._reads_latents and not random:
                part = self._map_tokens(maps[start : rows.stop])
                tokens.append(part.tokens.cpu())
            progress.advance(task, len(rows))
        text = {name: torch.cat([part[name].cpu() for part in texts]) for name in self._per_prompt()}
        kept = MapTokens(torch.cat(tokens), part.grid, part.input) if tokens else maps
        self._cache = _Cache(
            torch.cat(latents), text, maps=None if random else kept, pictures=pictures if random else None
        )
        if not bool(self._cache.latents.isfinite().all()):
            raise UserError("The VAE gives NaN or infinity; use dtype float32 or bfloat16.")

    def load(self, indices: Sequence[int], rng: np.random.Generator) -> Loaded:
        """Read examples and draw the batch's random numbers; needs no model.

        Args:
            indices: of the source, from this process' shard.
            rng: the batch's generator.
        """
        count, config = len(indices), self.config
        drop_text = torch.from_numpy(rng.random(count) < config.text_dropout)
        keep = torch.from_numpy(rng.random(count) >= config.condition_dropout)
        sigmas = sample_sigmas(count, self.timesteps, rng)
        noise = torch.from_numpy(rng.standard_normal((count, *self._latents_of_one), dtype=np.float32))
        children = rng.spawn(count)
        if self._cache is None:
            read = list(self.pool.map(self._read, indices, children))
            pictures = torch.stack([picture for picture, _, _ in read])
            maps = torch.stack([found for _, found, _ in read])
            captions = ["" if d else self.source.caption(i) for i, d in zip(indices, drop_text, strict=True)]
            return self._pinned(Loaded(maps, keep, sigmas, noise, pictures=pictures, captions=captions))
        rows = torch.tensor([self.shard.index(index) for index in indices])
        text = {name: values[rows] for name, values in self._cache.text.items()}
        for name, values in text.items():
            values[drop_text] = self._empty_text[name].cpu()
        kept = self._cached_maps(self._cache, rows, children)
        return self._pinned(Loaded(kept, keep, sigmas, noise, self._cache.latents[rows], text))

    def encode(self, loaded: Loaded) -> Batch:
        """Bring a batch to the device, through VAE and text encoders where these are not cached."""
        if loaded.latents is None or loaded.text is None:
            assert loaded.pictures is not None and loaded.captions is not None
            latents, text = self._encode_pictures(loaded.pictures), self._encode_text(loaded.captions)
        else:
            latents = self._to_device(loaded.latents)
            shared = {k: v for k, v in self._empty_text.items() if k not in loaded.text}
            text = {name: self._to_device(values) for name, values in loaded.text.items()} | shared
        return Batch(
            latents.float(),
            text,
            loaded.maps if isinstance(loaded.maps, MapTokens) else self._map_tokens(loaded.maps),
            self._to_device(loaded.keep),
            self._to_device(loaded.sigmas),
            self._to_device(loaded.noise),
        )

    def _cached_maps(
        self, cache: _Cache, rows: Tensor, rngs: Sequence[np.random.Generator]
    ) -> Tensor | MapTokens:
        if isinstance(cache.maps, MapTokens):
            return replace(cache.maps, tokens=cache.maps.tokens[rows])
        if cache.maps is not None:
            return cache.maps[rows]
        assert cache.pictures is not None
        return torch.stack([found for found, _ in self.pool.map(self._extract, cache.pictures[rows], rngs)])

    @property
    def _reads_latents(self) -> bool:
        return self.config.tokens is not None or self.config.encoder.input == "latents"

    def _measure(self) -> tuple[tuple[int, ...], int]:
        """Shape of an example's latents, and the bytes that a cached example takes."""
        latents = self._encode_pictures(self._first[None])
        text = sum(self._empty_text[name].nbytes for name in self._per_prompt())
        kept = latents.nbytes * (2 if self._reads_latents else 1)
        return tuple(latents.shape[1:]), kept + text + 2 * self._first.nbytes

    def _per_prompt(self) -> list[str]:
        """Names of the text tensors with one row a prompt; the others are the same for all prompts."""
        return [name for name, values in self._empty_text.items() if values.shape[0] == 1]

    def _read(self, index: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, bool]:
        """A picture and its map, uint8 (3, H, W), and whether the map was drawn at random."""
        picture = self.source.picture(index)
        return picture, *self._extract(picture, rng)

    def _extract(self, picture: Tensor, rng: np.random.Generator) -> tuple[Tensor, bool]:
        """The map of a picture, both uint8 (3, H, W), and whether it was drawn at random."""
        before = rng.bit_generator.state
        image = self.condition.extract(Image.fromarray(picture.permute(1, 2, 0).numpy()), rng)
        found = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return found, rng.bit_generator.state != before

    @torch.no_grad()
    def _encode_pictures(self, pictures: Tensor) -> Tensor:
        return self.family.encode_pictures(self.pipe, self._to_device(pictures).float() / 255)

    def _map_tokens(self, maps: Tensor) -> MapTokens:
        pictures = self._to_device(maps).float() / 255
        if self.config.tokens is None:
            return map_tokens(self.family, self.pipe, pictures, self.config.encoder.input)
        sides = (side // self.config.tokens.stride for side in pictures.shape[-2:])
        return map_tokens(
            self.family, self.pipe, resize_map(pictures, self.config.condition, *sides), "latents"
        )

    @torch.no_grad()
    def _encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        # Pipelines print every caption that they cut: most of them, where a text encoder reads little.
        loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            return self.family.encode_prompts(self.pipe, captions)
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _pinned(self, loaded: Loaded) -> Loaded:
        """In page-locked memory, from which a GPU copies without holding the step up."""
        if self.device.type == "cuda":
            for name in ("maps", "keep", "sigmas", "noise", "latents", "pictures"):
                value = getattr(loaded, name)
                if isinstance(value, MapTokens):
                    loaded.maps = replace(value, tokens=value.tokens.pin_memory())
                elif value is not None:
                    setattr(loaded, name, value.pin_memory())
            if loaded.text is not None:
                loaded.text = {name: values.pin_memory() for name, values in loaded.text.items()}
        return loaded
