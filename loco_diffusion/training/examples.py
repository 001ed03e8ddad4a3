"""Training examples: pictures, captions and condition maps as the tensors that a training step reads.

The work of a batch is split in two. `Examples.load` does what the processor does (drawing random numbers, reading
pictures, extracting maps) and may run in another thread while a step trains; `Examples.encode` does what the
models do. What does not change from epoch to epoch is computed once, if it fits into memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from loco_diffusion.conditions import Condition
from loco_diffusion.data.sources import Source
from loco_diffusion.errors import UserError
from loco_diffusion.images import to_pil
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.schedules import sample_sigmas

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from loco_diffusion.control.family import Family

_CHUNK = 8  # pictures prepared at once; the renderer of scenes is fastest with few


@dataclass
class Loaded:
    """A batch of B examples before the models have seen it; `latents` and `text` only if they are cached.

    Attributes:
        maps: condition maps, uint8 (B, 3, H, W).
        keep: rows whose map is not dropped, bool (B,).
        sigmas: noise levels, float32 (B,) in [0, 1].
        noise: float32, as the latents (B, C, h, w).
        pictures: uint8 (B, 3, H, W), and captions, "" where dropped: if not cached.
    """

    maps: Tensor
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
        maps: condition maps, float32 (B, 3, H, W) in [0, 1].
        keep, sigmas, noise: as in `Loaded`.
    """

    latents: Tensor
    text: dict[str, Tensor]
    maps: Tensor
    keep: Tensor
    sigmas: Tensor
    noise: Tensor


@dataclass
class _Cache:
    """Tensors of all examples of this process, in the order of its shard.

    Either `maps` or `pictures` (uint8) is there: of a condition that draws random numbers the pictures are kept
    and the maps are made anew in every batch, or each picture would always come with the same hole or blur.
    """

    latents: Tensor
    text: dict[str, Tensor]
    maps: Tensor | None
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
        self.family = family
        self.pipe = pipe
        self.device = device
        self.shard = range(process[0], len(source), process[1])
        self.pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // process[1]))
        self._cache: _Cache | None = None
        self._empty_text = self._encode_text([""])
        self._latents_of_one, self._bytes_of_one = self._measure()

    @property
    def cached(self) -> bool:
        """Whether VAE and text encoders are not needed any more."""
        return self._cache is not None

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
        maps: list[Tensor] = []
        kept: list[Tensor] = []
        random = False
        for start in range(0, len(self.shard), _CHUNK):
            indices = list(self.shard[start : start + _CHUNK])
            pictures = self.source.pictures(indices)
            kept.append(pictures)
            if not random:
                found, random = self._maps(pictures, np.random.default_rng([self.config.seed, *indices]))
                maps.append(found)
            latents.append(self._encode_pictures(pictures).cpu())
            texts.append({name: t.cpu() for name, t in self._encode_text(self.source.captions(indices)).items()})
            progress.advance(task, len(indices))
        text = {name: torch.cat([part[name] for part in texts]) for name in self._per_prompt()}
        self._cache = _Cache(
            torch.cat(latents),
            text,
            maps=None if random else torch.cat(maps),
            pictures=torch.cat(kept) if random else None,
        )
        if not bool(self._cache.latents.isfinite().all()):
            raise UserError("The VAE gives latents with NaN or infinity; use torch_dtype float32 or bfloat16.")

    def load(self, indices: Sequence[int], rng: np.random.Generator) -> Loaded:
        """Read examples and draw the batch's random numbers; needs no model.

        Args:
            indices: of the source, from this process' shard.
            rng: the batch's generator.
        """
        count, config = len(indices), self.config
        drop_text = torch.from_numpy(rng.random(count) < config.text_dropout)
        keep = torch.from_numpy(rng.random(count) >= config.condition_dropout)
        sigmas = sample_sigmas(count, config.timesteps, rng)
        noise = torch.from_numpy(rng.standard_normal((count, *self._latents_of_one), dtype=np.float32))
        if self._cache is None:
            pictures = self.source.pictures(indices)
            maps, _ = self._maps(pictures, rng)
            captions = self.source.captions(indices)
            captions = ["" if drop else text for text, drop in zip(captions, drop_text, strict=True)]
            return self._pinned(Loaded(maps, keep, sigmas, noise, pictures=pictures, captions=captions))
        rows = torch.tensor([self.shard.index(index) for index in indices])
        text = {name: values[rows] for name, values in self._cache.text.items()}
        for name, values in text.items():
            values[drop_text] = self._empty_text[name].cpu()
        if self._cache.maps is not None:
            maps = self._cache.maps[rows]
        else:
            assert self._cache.pictures is not None
            maps, _ = self._maps(self._cache.pictures[rows], rng)
        return self._pinned(Loaded(maps, keep, sigmas, noise, self._cache.latents[rows], text))

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
            self._to_device(loaded.maps).float() / 255,
            self._to_device(loaded.keep),
            self._to_device(loaded.sigmas),
            self._to_device(loaded.noise),
        )

    def _measure(self) -> tuple[tuple[int, ...], int]:
        """Shape of an example's latents, and the bytes that a cached example takes."""
        first = self.shard[0]
        pictures = self.source.pictures([first])
        latents = self._encode_pictures(pictures)
        text = sum(self._empty_text[name].nbytes for name in self._per_prompt())
        return tuple(latents.shape[1:]), latents.nbytes + text + 2 * pictures.nbytes

    def _per_prompt(self) -> list[str]:
        """Names of the text tensors with one row a prompt; the others are the same for all prompts."""
        return [name for name, values in self._empty_text.items() if values.shape[0] == 1]

    def _maps(self, pictures: Tensor, rng: np.random.Generator) -> tuple[Tensor, bool]:
        """Condition maps of uint8 pictures (B, 3, H, W), alike, and whether any was drawn at random."""
        children = rng.spawn(len(pictures))

        def extract(picture: Tensor, child: np.random.Generator) -> tuple[Tensor, bool]:
            before = child.bit_generator.state
            image = self.condition.extract(to_pil(picture.float() / 255), child)
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            return pixels, child.bit_generator.state != before

        results = list(self.pool.map(extract, pictures, children))
        return torch.stack([pixels for pixels, _ in results]), any(drawn for _, drawn in results)

    @torch.no_grad()
    def _encode_pictures(self, pictures: Tensor) -> Tensor:
        return self.family.encode_pictures(self.pipe, self._to_device(pictures).float() / 255)

    @torch.no_grad()
    def _encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        return self.family.encode_prompts(self.pipe, captions)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _pinned(self, loaded: Loaded) -> Loaded:
        """In page-locked memory, from which a GPU copies without holding the step up."""
        if self.device.type == "cuda":
            for name in ("maps", "keep", "sigmas", "noise", "latents", "pictures"):
                tensor = getattr(loaded, name)
                if tensor is not None:
                    setattr(loaded, name, tensor.pin_memory())
            if loaded.text is not None:
                loaded.text = {name: values.pin_memory() for name, values in loaded.text.items()}
        return loaded
