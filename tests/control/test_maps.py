"""Condition maps: accepted kinds, and resizing that keeps what a condition's maps look like."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from loco_diffusion.control import map_tensor, resize_map


def test_every_kind_of_picture_is_taken() -> None:
    gray = Image.new("L", (32, 16), 255)
    transparent = Image.new("RGBA", (32, 16), (0, 0, 0, 0))
    maps = map_tensor([gray, transparent])
    assert maps.shape == (2, 3, 16, 32) and maps.dtype == torch.float32
    assert (maps == 1).all()
    assert map_tensor(torch.rand(1, 3, 8, 8).half()).dtype == torch.float32


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (48, 40), (64, 64)])
def test_edges_stay_black_and_white_and_are_not_lost(size: tuple[int, int]) -> None:
    edges = torch.zeros(1, 3, 32, 32)
    edges[..., 5] = 1
    resized = resize_map(edges, "canny", *size)
    assert resized.shape[-2:] == size
    assert set(resized.unique().tolist()) == {0.0, 1.0}
    assert (resized.amax(-1) == 1).all()  # the line still reaches from top to bottom
    assert resized.mean() < 0.2


@pytest.mark.parametrize("size", [(8, 8), (20, 28), (64, 64)])
def test_hidden_regions_stay_black(size: tuple[int, int]) -> None:
    masked = torch.full((1, 3, 32, 32), 0.5)
    masked[..., 8:24, 8:24] = 0
    resized = resize_map(masked, "mask", *size)
    assert ((resized == 0) | (resized > 0.45)).all()  # nothing between hidden and visible
    assert abs((resized == 0).float().mean().item() - 0.25) < 0.15


def test_other_maps_are_interpolated() -> None:
    depth = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    resized = resize_map(depth, "depth", 16, 16)
    assert (resized.diff(dim=-1) > 0).all() and resized.min() >= 0 and resized.max() <= 1
    assert resize_map(depth, "depth", 32, 32) is depth
