"""How well the edges of a generated picture follow the edge condition."""

from __future__ import annotations

from torch import Tensor

from loco_diffusion.metrics.functional import edge_f1
from loco_diffusion.metrics.mean import MeanOverPictures


class EdgeF1(MeanOverPictures):
    """Mean over pictures of `functional.edge_f1`, the score of the canny task.

    Args:
        tolerance: how far apart, in pixels, a predicted and a target edge may lie; 0 is strictly pixelwise.

    Example:
        >>> import torch
        >>> target = torch.zeros(2, 3, 8, 8)
        >>> target[..., 4] = 1
        >>> metric = EdgeF1(tolerance=1)
        >>> metric.update(target.roll(1, dims=-1), target)
        >>> metric.update(target, target)
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = True

    def __init__(self, tolerance: int = 0) -> None:
        super().__init__(f"edge_f1_{tolerance}px")
        self.tolerance = tolerance

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in a batch of edge maps (N, 3, H, W) in [0, 1] of generated and of input pictures."""
        self._add(edge_f1(preds, target, self.tolerance))
