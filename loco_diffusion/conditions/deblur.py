"""A blurred picture to sharpen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image, ImageFilter

REFERENCE_SIDE = 512
"""The short side, in pixels, for which blur radii are given."""


@dataclass(frozen=True)
class Deblur:
    """The picture under Pillow's Gaussian blur.

    Attributes:
        radius: in pixels of a picture whose short side is `REFERENCE_SIDE`; it scales with the picture.
        training_radii: least and greatest radius in training, where it is drawn uniformly.
    """

    radius: float = 5.0
    training_radii: tuple[float, float] = (1.0, 10.0)
    name: ClassVar[str] = "deblur"

    def __post_init__(self) -> None:
        least, greatest = self.training_radii
        if not 0 <= least <= greatest:
            raise ValueError(f"training_radii must rise from at least 0, not ({least:g}, {greatest:g})")

    def extract(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """Blur an RGB picture by `radius`, or with `rng` by a random radius from `training_radii`."""
        radius = self.radius if rng is None else rng.uniform(*self.training_radii)
        scaled = radius * min(image.size) / REFERENCE_SIDE
        return image.convert("RGB").filter(ImageFilter.GaussianBlur(scaled))
