"""Squared errors of pictures and maps on the scale 0..255."""

from __future__ import annotations

from torch import Tensor

from loco_diffusion.metrics.functional import blur_mse, gray_mse, masked_mse, pixel_mse
from loco_diffusion.metrics.mean import MeanOverPictures


class PixelMSE(MeanOverPictures):
    """Mean over pictures of `functional.pixel_mse`: on depth maps the depth task's score, else the RGB error.

    Example:
        >>> import torch
        >>> metric = PixelMSE()
        >>> metric(torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 10 / 255))
        tensor(100.)
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__("pixel_mse")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in a batch of pictures or maps (N, 3, H, W) in [0, 1]."""
        self._add(pixel_mse(preds, target))


class MaskedMSE(MeanOverPictures):
    """Mean over pictures of `functional.masked_mse`, the score of the mask task.

    Example:
        >>> import torch
        >>> metric = MaskedMSE()
        >>> hidden = torch.ones(2, 8, 8, dtype=torch.bool)
        >>> metric(torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 10 / 255), hidden)
        tensor(100.)
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__("masked_mse")

    def update(self, preds: Tensor, target: Tensor, hidden: Tensor) -> None:
        """Take in a batch of pictures (N, 3, H, W) in [0, 1] and their hidden regions, boolean (N, H, W)."""
        self._add(masked_mse(preds, target, hidden))


class GrayMSE(MeanOverPictures):
    """Mean over pictures of `functional.gray_mse`, the score of the colorization task.

    Example:
        >>> import torch
        >>> metric = GrayMSE()
        >>> metric(torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 10 / 255))
        tensor(100.)
    """

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__("gray_mse")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in a batch of pictures (N, 3, H, W) in [0, 1]."""
        self._add(gray_mse(preds, target))


class BlurMSE(MeanOverPictures):
    """Mean over pictures of `functional.blur_mse`, the score of the deblur task.

    Args:
        radius: of the blur, in pixels at a short side of 512, as in `conditions.Deblur`.

    Example:
        >>> import torch
        >>> metric = BlurMSE()
        >>> metric(torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 10 / 255))
        tensor(100.)
    """

    higher_is_better = False

    def __init__(self, radius: float = 5.0) -> None:
        super().__init__(f"blur_mse_{str(radius).replace('.', '_')}")  # a state's name may not have a dot
        self.radius = radius

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take in a batch of pictures (N, 3, H, W) in [0, 1]."""
        self._add(blur_mse(preds, target, self.radius))
