"""Conditions and the rows of a denoiser's batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loco_diffusion.errors import UserError


def spread(conditions: Tensor, rows: int, copies: Callable[[], int]) -> Tensor:
    """One row of a batch of conditions for each row of the denoiser's batch.

    A pipeline lays out the pictures of one prompt side by side, and repeats that whole batch for the halves of
    classifier-free guidance.

    Args:
        conditions: (B, ...).
        rows: of the denoiser's batch.
        copies: how often the batch is repeated; asked only where that matters.

    Returns:
        (rows, ...), or (1, ...) where one condition serves all.

    Raises:
        UserError: the conditions cannot be dealt out to the rows.
    """
    number = len(conditions)
    if number in (1, rows):
        return conditions
    times = copies()
    if rows % (number * times):
        raise UserError(
            f"There are {number} condition maps for {rows // times} pictures; pass one map, or as many maps as "
            "prompts."
        )
    side_by_side = conditions.repeat_interleave(rows // (number * times), dim=0)
    return torch.cat([side_by_side] * times)
