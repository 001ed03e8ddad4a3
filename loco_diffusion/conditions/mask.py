"""A hidden region to fill in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from loco_diffusion.errors import UserError

MIN_HIDDEN = 0.05
MAX_HIDDEN = 0.95
"""Least and greatest part of the picture that a random rectangle hides."""


@dataclass(frozen=True)
class Mask:
    """The picture with a region blacked out, which the model must fill in."""

    name: ClassVar[str] = "mask"

    def extract(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """Hide `region` of an RGB picture; for a mask of your own use `apply`."""
        return self.apply(image, self.region(image.width, image.height, rng))

    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """The region that `extract` hides, for a scorer that looks only there.

        Returns:
            Boolean array (height, width), True where hidden: the central rectangle of half the width and half
            the height, or with `rng` a `random_rectangle`.
        """
        if rng is not None:
            return random_rectangle(width, height, rng)
        hidden = np.zeros((height, width), dtype=bool)
        hidden[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
        return hidden

    def apply(self, image: Image.Image, hidden: np.ndarray) -> Image.Image:
        """Black out a region of an RGB picture.

        Args:
            image: an RGB picture of H x W pixels.
            hidden: boolean array (H, W), True where hidden; `region_from_image` makes one of a mask picture.

        Raises:
            UserError: mask and picture differ in size.
        """
        pixels = np.array(image.convert("RGB"))
        if hidden.shape != pixels.shape[:2]:
            mask_size = "x".join(str(side) for side in reversed(hidden.shape))
            raise UserError(
                f"The mask is {mask_size} px and the picture {image.width}x{image.height} px; "
                "make them the same size."
            )
        pixels[hidden.astype(bool)] = 0
        return Image.fromarray(pixels)


def region_from_image(image: Image.Image) -> np.ndarray:
    """Boolean array (H, W) of a mask picture: True (hidden) where it is brighter than middle gray."""
    return np.asarray(image.convert("L")) > 127


def random_rectangle(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A rectangle between two uniform corners, redrawn until it hides `MIN_HIDDEN` to `MAX_HIDDEN`.

    Args:
        width: of the picture, in pixels, at least 2.
        height: of the picture, in pixels, at least 2.
        rng: the generator; the same state gives the same rectangle.

    Returns:
        Boolean array (height, width), True where hidden.

    Raises:
        ValueError: a side is less than 2.
    """
    if min(width, height) < 2:
        raise ValueError(f"a random rectangle needs sides of at least 2 px, got {width}x{height}")
    while True:
        left, right = np.sort(rng.integers(0, width, size=2, endpoint=True))
        top, bottom = np.sort(rng.integers(0, height, size=2, endpoint=True))
        if MIN_HIDDEN <= (right - left) * (bottom - top) / (width * height) <= MAX_HIDDEN:
            hidden = np.zeros((height, width), dtype=bool)
            hidden[top:bottom, left:right] = True
            return hidden
