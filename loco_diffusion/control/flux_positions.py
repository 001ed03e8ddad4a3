"""Positions of FLUX's image tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from loco_diffusion.control.family import spread_positions


def image_ids(rows: int, columns: int, like: Tensor, stride: int, axes: int = 3) -> Tensor:
    """Positions (rows * columns, axes) of tokens, row by row: 0, row, column, and 0 for more axes.

    Args:
        rows, columns: of tokens.
        like: gives dtype and device.
        stride: see `Family.predict`.
        axes: 3 for FLUX.1, 4 for FLUX.2.
    """
    zero = torch.zeros(1, device=like.device)
    sides = (spread_positions(side, stride, like.device) for side in (rows, columns))
    return torch.cartesian_prod(zero, *sides, *[zero] * (axes - 3)).to(like.dtype)
