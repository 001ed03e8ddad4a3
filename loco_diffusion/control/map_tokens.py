"""Condition maps as the tokens that a condition encoder reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from loco_diffusion.control.encoder import EncoderInput
from loco_diffusion.control.family import Family, Pipeline


@dataclass(frozen=True)
class MapTokens:
    """A batch of condition maps, ready for encoders of one input; to be kept where maps are used again.

    Attributes:
        tokens: (B, rows * columns, in_features), row by row.
        grid: rows and columns of tokens.
        input: what the tokens are made of.
    """

    tokens: Tensor
    grid: tuple[int, int]
    input: EncoderInput

    def as_map(self) -> Tensor:
        """The tokens as (B, in_features, rows, columns)."""
        return self.tokens.mT.unflatten(2, self.grid)

    def __len__(self) -> int:
        return len(self.tokens)


def map_tokens(family: Family, pipe: Pipeline, maps: Tensor, input: EncoderInput) -> MapTokens:
    """Tokens of condition maps.

    Args:
        family: of the pipeline.
        pipe: whose VAE encodes the maps, where latents are wanted.
        maps: (B, 3, H, W) in [0, 1]; H and W are multiples of the family's `token_pixels`.
        input: "pixels" or "latents".
    """
    side = family.token_pixels(pipe)
    grid = (maps.shape[-2] // side, maps.shape[-1] // side)
    if input == "pixels":
        return MapTokens(pixel_tokens(maps, side), grid, input)
    return MapTokens(family.pack(family.encode_pictures(pipe, maps)), grid, input)


def token_width(family: Family, pipe: Pipeline, input: EncoderInput) -> int:
    """Channels of a map's token."""
    if input == "pixels":
        return 3 * family.token_pixels(pipe) ** 2
    return family.token_channels(family.denoiser(pipe))


def pixel_tokens(maps: Tensor, token_pixels: int) -> Tensor:
    """Cut maps into the squares that the denoiser's tokens cover.

    Args:
        maps: (B, 3, H, W) in [0, 1]; H and W are multiples of `token_pixels`.
        token_pixels: side of a token, in pixels.

    Returns:
        (B, tokens, 3 * token_pixels ** 2) in [-1, 1], tokens row by row.
    """
    return F.pixel_unshuffle(maps * 2 - 1, token_pixels).flatten(2).mT
