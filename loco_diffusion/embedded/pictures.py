"""Rendered scenes kept on disk, so that a resumed recipe does not draw them again."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import sample_scene

SIZE = 128
_DRAWN_AT_ONCE = 8  # more would leave the processor's cache
_SHARD = 2000  # scenes a file


def rendered_scenes(seeds: range, cache: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (N, 3, 128, 128) and depth maps (N, 128, 128) of the scenes of `seeds`, uint8.

    `seeds` must start and stop at a multiple of 2000, the size of the files kept in `cache`.
    """
    starts = range(seeds.start, seeds.stop, _SHARD)
    shards = [_shard(range(start, start + _SHARD), cache) for start in starts]
    return torch.cat([shard["image"] for shard in shards]), torch.cat([shard["depth"] for shard in shards])


def _shard(seeds: range, cache: Path) -> dict[str, torch.Tensor]:
    path = cache / f"scenes-{seeds.start}-{seeds.stop}.safetensors"
    if path.exists():
        return load_file(path)
    image = torch.empty(len(seeds), 3, SIZE, SIZE, dtype=torch.uint8)
    depth = torch.empty(len(seeds), SIZE, SIZE, dtype=torch.uint8)
    for start in track(
        range(0, len(seeds), _DRAWN_AT_ONCE), description=f"Drawing scenes from {seeds.start}"
    ):
        these = slice(start, start + _DRAWN_AT_ONCE)
        drawn = render([sample_scene(seed) for seed in seeds[these]], SIZE)
        image[these] = (drawn.image * 255).round().to(torch.uint8)
        depth[these] = (drawn.depth * 255).round().to(torch.uint8)
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({"image": image, "depth": depth}, partial)
    os.replace(partial, path)
    return {"image": image, "depth": depth}
