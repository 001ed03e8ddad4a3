"""Absolute positions of patches, for a condition of fewer tokens than the picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from torch import Tensor


@contextmanager
def spread_patches(layer: PatchEmbed, latents: Tensor, stride: int) -> Iterator[None]:
    """In the block, tokens of a layer lie in the middle of the stride x stride tokens that each stands for.

    The vector of such a place is the mean of those tokens' vectors, because a table that came with the weights
    has none between its cells.

    Args:
        layer: the denoiser's input layer; one without positions stays as it is.
        latents: that it is to cut into tokens, (B, C, h, w).
        stride: how many of the picture's tokens a token stands for along each side.
    """
    if stride == 1 or layer.pos_embed is None:
        yield
        return
    # As a table of exactly this size, which is taken as it is. A hook could do it, too, but a compiled model
    # would not see it come and go.
    rows, columns = (side // layer.patch_size for side in latents.shape[-2:])
    names = ("pos_embed", "pos_embed_max_size", "height", "width")
    before = [getattr(layer, name) for name in names]
    picture = _positions(layer, rows * stride, columns * stride, latents.device)
    table = picture.unflatten(1, (rows, stride, columns, stride)).mean((2, 4)).flatten(1, 2)
    for name, value in zip(names, (table, None, rows, columns), strict=True):
        setattr(layer, name, value)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(layer, name, value)


def _positions(layer: PatchEmbed, rows: int, columns: int, device: torch.device) -> Tensor:
    """The vectors (1, rows * columns, width) that the layer adds to a grid of tokens, cut or computed."""
    if layer.pos_embed_max_size:
        cut: Tensor = layer.cropped_pos_embed(rows * layer.patch_size, columns * layer.patch_size)
        return cut.to(device)
    computed: Tensor = get_2d_sincos_pos_embed(
        embed_dim=layer.pos_embed.shape[-1],
        grid_size=(rows, columns),
        base_size=layer.base_size,
        interpolation_scale=layer.interpolation_scale,
        device=device,
        output_type="pt",
    )
    return computed[None].float()
