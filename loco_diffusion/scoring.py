"""Which scores a control task has, and how they are taken from pictures.

`loco_diffusion.metrics` knows how to score tensors; this file knows what each task compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from loco_diffusion.conditions import Condition, Mask, get_condition
from loco_diffusion.errors import UserError
from loco_diffusion.images import to_tensor
from loco_diffusion.metrics import BlurMSE, EdgeF1, GrayMSE, MaskedMSE, PixelMSE


@dataclass(frozen=True)
class Score:
    """One number about how well generated pictures follow what their condition was extracted from.

    Attributes:
        key: identifier within its task.
        title: for tables.
        higher_is_better: the direction.
        compared: the condition maps of the pictures, the pictures themselves, or their hidden regions.
        metric: makes the torchmetrics metric.
    """

    key: str
    title: str
    higher_is_better: bool
    compared: Literal["maps", "pictures", "hidden"]
    metric: Callable[[], Metric]


def _psnr() -> Metric:
    return PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3))  # the mean over pictures, as the other scores


def _ssim() -> Metric:
    return StructuralSimilarityIndexMeasure(data_range=1.0)


_SIMILARITY = (
    Score("ssim", "SSIM", True, "pictures", _ssim),
    Score("psnr", "PSNR", True, "pictures", _psnr),
)

SCORES: dict[str, tuple[Score, ...]] = {
    "canny": (
        Score("f1", "edge F1", True, "maps", EdgeF1),
        Score("f1_1px", "edge F1, 1 px", True, "maps", lambda: EdgeF1(tolerance=1)),
        *_SIMILARITY,
    ),
    "depth": (Score("mse", "depth MSE", False, "maps", PixelMSE), *_SIMILARITY),
    "mask": (
        Score("hidden_mse", "hidden-pixel MSE", False, "hidden", MaskedMSE),
        Score("mse", "whole-picture MSE", False, "pictures", PixelMSE),
        *_SIMILARITY,
    ),
    "colorization": (
        Score("gray_mse", "gray MSE", False, "pictures", GrayMSE),
        Score("mse", "RGB MSE", False, "pictures", PixelMSE),
        *_SIMILARITY,
    ),
    "deblur": (
        Score("blur_mse", "blurred MSE", False, "pictures", BlurMSE),
        Score("mse", "unblurred MSE", False, "pictures", PixelMSE),
        *_SIMILARITY,
    ),
}
"""The scores of each task, named after its condition; the first is the one that the task is judged by.
Errors are on the scale 0..255, PSNR is in dB, the others are at most 1."""


class TaskScores:
    """All scores of one task, each the mean over pictures.

    Args:
        condition: the task, by the name of its condition or by the condition itself, which then makes the maps
            that are compared.

    Raises:
        UserError: the task has no scores.
    """

    def __init__(self, condition: str | Condition) -> None:
        name = condition if isinstance(condition, str) else condition.name
        if name not in SCORES:
            raise UserError(f"There are no scores for {name!r}; choose from {', '.join(SCORES)}.")
        self._scores = SCORES[name]
        self._condition = get_condition(name) if isinstance(condition, str) else condition
        self._metrics = {score.key: score.metric() for score in self._scores}
        for metric in self._metrics.values():  # one process has all pictures; others may have nothing to add
            metric.sync_on_compute = False

    def update(self, pictures: Sequence[Image.Image], originals: Sequence[Image.Image]) -> None:
        """Take in a batch.

        Args:
            pictures: generated RGB pictures.
            originals: what the condition maps were extracted from, as many and of one size.
        """
        pairs = {"pictures": (_stack(pictures), _stack(originals))}
        if any(score.compared == "maps" for score in self._scores):
            extract = self._condition.extract
            pairs["maps"] = (_stack([extract(p) for p in pictures]), _stack([extract(p) for p in originals]))
        for score in self._scores:
            metric = self._metrics[score.key]
            if score.compared == "hidden":
                metric.update(*pairs["pictures"], _hidden(originals))
            else:
                metric.update(*pairs[score.compared])

    def compute(self) -> dict[str, float]:
        """The scores by key."""
        return {key: float(metric.compute()) for key, metric in self._metrics.items()}


def _stack(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, 3, H, W) in [0, 1]."""
    return torch.stack([to_tensor(picture) for picture in pictures])


def _hidden(pictures: Sequence[Image.Image]) -> Tensor:
    """(N, H, W) bool, where the mask condition hides the pictures."""
    regions = [Mask().region(picture.width, picture.height) for picture in pictures]
    return torch.from_numpy(np.stack(regions))
