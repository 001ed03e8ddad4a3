"""A hidden region to fill in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from PIL import Image, ImageDraw

from loco_diffusion.errors import UserError

MIN_HIDDEN = 0.05
MAX_HIDDEN = 0.95
"""Least and greatest part of the picture that a random region hides."""


@dataclass(frozen=True)
class Mask:
    """The picture with a region blacked out, which the model must fill in.

    Attributes:
        training_shapes: of the region in training, one of them drawn for each picture: "rectangle" (see
            `random_rectangle`), "strokes" (see `random_strokes`).
        training_inverted: share of the pictures, in training, of which all but that region is hidden.
    """

    training_shapes: tuple[Literal["rectangle", "strokes"], ...] = ("rectangle",)
    training_inverted: float = 0.0
    name: ClassVar[str] = "mask"

    def __post_init__(self) -> None:
        if not self.training_shapes or not set(self.training_shapes) <= {"rectangle", "strokes"}:
            raise ValueError(
                f"training_shapes must be of rectangle and strokes, not {self.training_shapes!r}"
            )
        if not 0 <= self.training_inverted <= 1:
            raise ValueError(f"training_inverted must be in [0, 1], not {self.training_inverted:g}")

    def extract(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """Hide `region` of an RGB picture; for a mask of your own use `apply`."""
        return self.apply(image, self.region(image.width, image.height, rng))

    def region(self, width: int, height: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """The region that `extract` hides, for a scorer that looks only there.

        Returns:
            Boolean array (height, width), True where hidden: the central rectangle of half the width and half
            the height, or with `rng` a random region of `training_shapes`.
        """
        if rng is not None:
            return self._random_region(width, height, rng)
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

    def _random_region(self, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
        shapes = self.training_shapes
        shape = shapes[int(rng.integers(len(shapes)))] if len(shapes) > 1 else shapes[0]
        hidden = (random_strokes if shape == "strokes" else random_rectangle)(width, height, rng)
        inverted = self.training_inverted > 0 and rng.random() < self.training_inverted
        return ~hidden if inverted else hidden


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


def random_strokes(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Zigzag strokes of a round brush, redrawn until they hide `MIN_HIDDEN` to `MAX_HIDDEN`.

    After the free-form masks of Yu et al. 2019 (arXiv 1806.03589, appendix): the direction swings around a mean
    one, which is drawn for each stroke like the width of the brush. Lengths follow the picture's short side.

    Args, returns and raises: as `random_rectangle`.
    """
    if min(width, height) < 2:
        raise ValueError(f"random strokes need sides of at least 2 px, got {width}x{height}")
    while True:
        canvas = Image.new("1", (width, height))
        for _ in range(rng.integers(1, 5)):
            _draw_stroke(ImageDraw.Draw(canvas), width, height, rng)
        hidden = np.array(canvas)
        if MIN_HIDDEN <= hidden.mean() <= MAX_HIDDEN:
            return hidden


def _draw_stroke(draw: ImageDraw.ImageDraw, width: int, height: int, rng: np.random.Generator) -> None:
    short = min(width, height)
    brush = max(1, round(short * rng.uniform(0.05, 0.2)))
    turn, swing = rng.uniform(0, 2 * math.pi), rng.uniform(math.pi / 6, math.pi / 2)
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    for number in range(rng.integers(2, 9)):
        angle = turn + (swing if number % 2 else -swing) * rng.uniform(0.5, 1)
        length = short * rng.uniform(0.1, 0.5)
        # A stroke that would leave the picture goes along its edge.
        to_x = min(max(x + length * math.cos(angle), 0), width)
        to_y = min(max(y + length * math.sin(angle), 0), height)
        draw.line((x, y, to_x, to_y), fill=1, width=brush)
        for end in ((x, y), (to_x, to_y)):
            draw.circle(end, brush / 2, fill=1)
        x, y = to_x, to_y
