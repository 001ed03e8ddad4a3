"""Conditions and the rows of a denoiser's batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loco_diffusion.errors import UserError


class Rows:
    """How a pipeline lays out the rows of its denoiser's batch, and which of them see the condition.

    The pictures of one prompt are side by side. For classifier-free guidance the whole batch is stacked twice,
    the unconditional half first, or the denoiser is called twice a step, the unconditional time last.

    Args:
        copies: how often the batch is stacked now; asked only where that matters.

    Attributes:
        unconditional: whether the unconditional half sees the condition.
        alone: whether this call of the denoiser is for the conditional half only, whatever `copies` says.
        later: whether the denoiser has been called in this step.
    """

    def __init__(self, copies: Callable[[], int]) -> None:
        self._copies = copies
        self.unconditional = True
        self.alone = False
        self.later = False

    def spread(self, conditions: Tensor, rows: int) -> Tensor:
        """One row of a batch of conditions for each row of the denoiser's batch.

        Args:
            conditions: (B, ...).
            rows: of the denoiser's batch.

        Returns:
            (rows, ...), or (1, ...) where one condition serves all.

        Raises:
            UserError: the conditions cannot be dealt out to the rows.
        """
        number = len(conditions)
        if number == 1:
            return conditions
        times = 1 if self.alone else self._copies()
        if rows % (number * times):
            raise UserError(
                f"There are {number} condition maps for {rows // times} pictures; pass one map, or as many maps as "
                "prompts."
            )
        side_by_side = conditions.repeat_interleave(rows // (number * times), dim=0)
        return torch.cat([side_by_side] * times)

    def spread_or_drop(self, conditions: Tensor, rows: int, nothing: float) -> Tensor:
        """As `spread`, with `nothing` in the rows that do not see the condition."""
        spread = self.spread(conditions, rows)
        dropped = self._dropped(rows)
        if not dropped:
            return spread
        spread = spread.expand(rows, *spread.shape[1:])
        return torch.cat([torch.full_like(spread[:dropped], nothing), spread[dropped:]])

    def _dropped(self, rows: int) -> int:
        if self.unconditional or self.alone:
            return 0
        if self._copies() == 1:
            return rows if self.later else 0
        return rows // 2
