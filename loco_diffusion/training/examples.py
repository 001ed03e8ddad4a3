"""Training examples: pictures, captions and condition maps as the tensors that a training step reads.

The work of a batch is split in two. `Examples.load` does what the processor does (drawing random numbers,
reading pictures, extracting maps) and may run in another thread while a step trains; `Examples.encode` does
what the models do. What does not change from epoch to epoch is computed once, see `preparation`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from loco_diffusion.conditions import Condition
from loco_diffusion.control import MapTokens
from loco_diffusion.data.batches import Processes, ShuffledBatches, StreamedBatches, sort_into_buckets
from loco_diffusion.data.hub import StreamSource
from loco_diffusion.data.sources import Record, Source
from loco_diffusion.errors import UserError
from loco_diffusion.training.cache import Cache
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.encoding import Encoding
from loco_diffusion.training.schedules import draws_of, sample_sigmas

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from loco_diffusion.control.family import Family

MapKind: TypeAlias = Literal["maps", "tokens", "pictures"]


class Read(NamedTuple):
    """A picture and its map, both uint8 (3, H, W), and whether the map was drawn at random."""

    picture: Tensor
    map: Tensor
    drawn: bool


@dataclass
class Loaded:
    """A batch of B examples before the models have seen it.

    Attributes:
        maps: condition maps, uint8 (B, 3, H, W), or their tokens where these are cached.
        keep: rows whose map is not dropped, bool (B,).
        sigmas: noise levels, float32 (B,) in [0, 1].
        noise: float32, as the latents (B, C, h, w).
        latents: if they are cached; otherwise there are
        pictures: uint8 (B, 3, H, W).
        text: if it is cached; otherwise there are
        captions: "" where dropped.
    """

    maps: Tensor | MapTokens
    keep: Tensor
    sigmas: Tensor
    noise: Tensor
    latents: Tensor | None = None
    pictures: Tensor | None = None
    text: dict[str, Tensor] | None = None
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


@dataclass(frozen=True)
class Caches:
    """What is computed once.

    Attributes:
        text: one row of each text tensor.
        latents: `latents`; if they are there, so are
        maps: one tensor, named by its kind.
    """

    text: Cache | None = None
    latents: Cache | None = None
    maps: Cache | None = None


class Examples:
    """The examples of one process.

    Args:
        config: the run.
        source: all pictures.
        condition: makes the maps, unless the pictures come with them.
        family: of the pipeline.
        pipe: whose VAE and text encoders are used, on `device`.
        device: where batches go.
        process: this process and how many there are; each uses its own share of the pictures.

    Attributes:
        first: the first example of the source; of a stream, that of the first batch.
        map_kind: what of the maps can be computed once. Where a condition draws random numbers, pictures are
            kept and the maps made anew in every batch, or each picture would always come with the same hole
            or blur.

    Raises:
        UserError: there are fewer pictures than processes, or the first one cannot be read.
    """

    def __init__(
        self,
        config: TrainingConfig,
        source: Source | StreamSource,
        condition: Condition,
        family: Family,
        pipe: DiffusionPipeline,
        device: torch.device,
        process: Processes = (0, 1),
    ) -> None:
        self.config = config
        self.source = source
        self.condition = condition
        self.timesteps = config.timesteps.resolved(family.flow, pipe.scheduler)
        self.family = family
        self.pipe = pipe
        self.process = process
        self.framing = config.data.framing
        self.pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // process[1]))
        self.encoding = Encoding(config, family, pipe, device)
        self.batches = self._make_batches()
        self.caches = Caches()
        first, self._first_bucket = self._first()
        self.first = self.read(first, self._first_bucket, np.random.default_rng(0))
        self.first_latents = self.encoding.pictures(self.first.picture[None])
        self.map_kind: MapKind = (
            "pictures" if self.first.drawn else "tokens" if self.encoding.input == "latents" else "maps"
        )

    @property
    def cached(self) -> bool:
        """Whether nothing is computed again that does not change from epoch to epoch."""
        return self.caches.text is not None and self.caches.latents is not None

    @property
    def models(self) -> list[nn.Module]:
        """What of the pipeline, beside the denoiser, every step needs."""
        maps_need_vae = self.encoding.input == "latents" and self.map_kind != "tokens"
        vae = [self.pipe.vae] if self.caches.latents is None or maps_need_vae else []
        return vae + (list(self.encoding.text_encoders.values()) if self.caches.text is None else [])

    def load(self, number: int) -> Loaded:
        """Read the pictures of a batch (0-based) and draw its random numbers; needs no model.

        Raises:
            UserError: a picture or a caption cannot be read.
        """
        config = self.config
        bucket, items = self.batches.batch(number)
        rng = draws_of(config.seed, number, self.process[0])
        drop_text = torch.from_numpy(rng.random(len(items)) < config.text_dropout)
        keep = torch.from_numpy(rng.random(len(items)) >= config.condition_dropout)
        sigmas = sample_sigmas(len(items), self.timesteps, rng)
        shape = (len(items), *self._latents_shape(bucket))
        noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        children = rng.spawn(len(items))
        records = [] if self.cached else [self._record(item) for item in items]
        if self.caches.latents is None:
            read = list(self.pool.map(self.read, records, [bucket] * len(items), children))
            maps: Tensor | MapTokens = torch.stack([example.map for example in read])
            pictures = torch.stack([example.picture for example in read])
            loaded = Loaded(maps, keep, sigmas, noise, pictures=pictures)
        else:
            maps = self._cached_maps(_indices(items), bucket, children)
            latents = self.caches.latents.rows(_indices(items))["latents"]
            loaded = Loaded(maps, keep, sigmas, noise, latents=latents)
        if self.caches.text is None:
            loaded.captions = ["" if d else r.caption for r, d in zip(records, drop_text, strict=True)]
        else:
            loaded.text = self.caches.text.rows(_indices(items))
            for name, values in loaded.text.items():
                values[drop_text] = self.encoding.empty_text[name].cpu()
        return self._pinned(loaded)

    def encode(self, loaded: Loaded) -> Batch:
        """Bring a batch to the device, through VAE and text encoders where their results are not cached."""
        encoding = self.encoding
        if loaded.latents is None:
            assert loaded.pictures is not None
            latents = encoding.pictures(loaded.pictures)
        else:
            latents = encoding.to_device(loaded.latents)
        if loaded.text is None:
            assert loaded.captions is not None
            text = encoding.text(loaded.captions)
        else:
            shared = {k: v for k, v in encoding.empty_text.items() if k not in loaded.text}
            text = {name: encoding.to_device(values) for name, values in loaded.text.items()} | shared
        return Batch(
            latents.float(),
            text,
            loaded.maps if isinstance(loaded.maps, MapTokens) else encoding.maps(loaded.maps),
            encoding.to_device(loaded.keep),
            encoding.to_device(loaded.sigmas),
            encoding.to_device(loaded.noise),
        )

    def read(self, record: Record, bucket: int, rng: np.random.Generator) -> Read:
        """Read, resize, crop and flip a picture and its map, or extract the map.

        Raises:
            UserError: one of them cannot be read.
        """
        picture = record.picture()
        frame = self.framing.frame(picture.size, bucket, rng)
        framed, found = frame.apply(picture), record.map()
        if found is not None:
            return Read(_pixels(framed), _pixels(frame.apply_to_map(found, self.condition.name)), False)
        return Read(_pixels(framed), *self._extract(framed, rng))

    def _make_batches(self) -> ShuffledBatches | StreamedBatches:
        config, source = self.config, self.source
        if isinstance(source, StreamSource):
            return StreamedBatches(source, self.framing, config.seed, config.batch_size, self.process)
        if self.process[1] > len(source):
            raise UserError(
                f"{len(source)} pictures are too few for {self.process[1]} processes; add pictures."
            )
        buckets: Sequence[Sequence[int]] = [range(len(source))]
        if len(self.framing.sizes) > 1:
            sizes = list(self.pool.map(lambda index: source[index].size(), buckets[0]))
            buckets = sort_into_buckets(sizes, self.framing, self.process[1])
        return ShuffledBatches(buckets, config.seed, config.batch_size, self.process)

    def _first(self) -> tuple[Record, int]:
        """The first record of the source, or of the first batch of a stream, and its bucket."""
        if isinstance(self.batches, ShuffledBatches):
            return self._record(0), next(n for n, bucket in enumerate(self.batches.buckets) if 0 in bucket)
        bucket, records = self.batches.batch(0)
        return records[0], bucket

    def _record(self, item: int | Record) -> Record:
        if isinstance(item, Record):
            return item
        assert not isinstance(self.source, StreamSource)
        return self.source[item]

    def _cached_maps(
        self, indices: Sequence[int], bucket: int, rngs: Sequence[np.random.Generator]
    ) -> Tensor | MapTokens:
        assert self.caches.maps is not None
        kept = self.caches.maps.rows(indices)[self.map_kind]
        if self.map_kind == "tokens":
            return MapTokens(kept, self.encoding.map_grid(self.framing.sizes[bucket]), "latents")
        if self.map_kind == "maps":
            return kept
        pictures = (Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in kept)
        return torch.stack([found for found, _ in self.pool.map(self._extract, pictures, rngs)])

    def _latents_shape(self, bucket: int) -> tuple[int, int, int]:
        """(C, h, w) of a bucket's latents."""
        width, height = self.framing.sizes[bucket]
        first_width, first_height = self.framing.sizes[self._first_bucket]
        _, channels, rows, columns = self.first_latents.shape
        return channels, rows * height // first_height, columns * width // first_width

    def _extract(self, picture: Image.Image, rng: np.random.Generator) -> tuple[Tensor, bool]:
        """The map of a picture, uint8 (3, H, W), and whether it was drawn at random."""
        before = rng.bit_generator.state
        found = self.condition.extract(picture, rng)
        return _pixels(found.convert("RGB")), rng.bit_generator.state != before

    def _pinned(self, loaded: Loaded) -> Loaded:
        """In page-locked memory, from which a GPU copies without holding the step up."""
        if self.encoding.device.type == "cuda":
            for name in ("maps", "keep", "sigmas", "noise", "latents", "pictures"):
                value = getattr(loaded, name)
                if isinstance(value, MapTokens):
                    loaded.maps = replace(value, tokens=value.tokens.pin_memory())
                elif value is not None:
                    setattr(loaded, name, value.pin_memory())
            if loaded.text is not None:
                loaded.text = {name: values.pin_memory() for name, values in loaded.text.items()}
        return loaded


def _indices(items: Sequence[int | Record]) -> list[int]:
    """The items of a source with an index: only such a one is cached."""
    return [item for item in items if not isinstance(item, Record)]


def _pixels(image: Image.Image) -> Tensor:
    """An RGB picture as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
