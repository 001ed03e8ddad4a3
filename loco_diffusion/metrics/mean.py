"""The state that every control score keeps: a sum over pictures and their number."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanOverPictures(Metric):
    """Base of the control scores: every picture of a data set weighs the same, whatever the batches.

    Args:
        score_name: an identifier of the score with its settings. It names the states, because
            `torchmetrics.MetricCollection` merges metrics whose states have equal names and happen to be
            equal after the first batch, as two different scores may.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, score_name: str) -> None:
        super().__init__()
        self._total, self._count = f"{score_name}_total", f"{score_name}_count"
        self.add_state(self._total, torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state(self._count, torch.tensor(0), dist_reduce_fx="sum")

    def _add(self, scores: Tensor) -> None:
        """Take in the scores (N,) of a batch."""
        setattr(self, self._total, getattr(self, self._total) + scores.sum())
        setattr(self, self._count, getattr(self, self._count) + scores.numel())

    def compute(self) -> Tensor:
        """The mean score, a scalar."""
        total: Tensor = getattr(self, self._total)
        return total / getattr(self, self._count)
