"""Positions of FLUX.1's image tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from loco_diffusion.control.family import spread_positions


def image_ids(rows: int, columns: int, like: Tensor, stride: int) -> Tensor:
    """Positions (rows * columns, 3), row by row: 0, row, column.

    Args:
        rows, columns: of tokens.
        like: gives dtype and device.
        stride: see `Family.predict`.
    """
    axes = (
        torch.zeros(1, device=like.device),
        *(spread_positions(side, stride, like.device) for side in (rows, columns)),
    )
    return torch.cartesian_prod(*axes).to(like.dtype)
