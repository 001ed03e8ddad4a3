"""Which part of a picture a training example shows: size, crop and flip, the same for the picture and its map."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps

from loco_diffusion.control.maps import resize_map
from loco_diffusion.images import to_pil, to_tensor

Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""

_SHARP = ("canny", "mask")
"""Conditions whose given maps must not be blended: `resize_map` knows how to resize them."""


@dataclass(frozen=True)
class Frame:
    """A part of a picture.

    Attributes:
        box: left, upper, right and lower edge in pixels of the picture, of the aspect ratio of `size`.
        picture: size of the picture.
        size: what the part is resized to.
        flip: whether left and right are exchanged then.
    """

    box: tuple[float, float, float, float]
    picture: Size
    size: Size
    flip: bool = False

    def apply(self, image: Image.Image) -> Image.Image:
        """The part of the picture, or of another one of the same scene at another resolution (Lanczos)."""
        across, down = image.width / self.picture[0], image.height / self.picture[1]
        left, upper, right, lower = self.box
        box = (left * across, upper * down, right * across, lower * down)
        return self._flipped(image.resize(self.size, Image.Resampling.LANCZOS, box=box))

    def apply_to_map(self, found: Image.Image, condition: str) -> Image.Image:
        """The part of a condition map; edges stay edges and masks stay masks, see `resize_map`."""
        if condition not in _SHARP:
            return self.apply(found)
        across, down = found.width / self.picture[0], found.height / self.picture[1]
        left, upper, right, lower = self.box
        corners = (round(left * across), round(upper * down), round(right * across), round(lower * down))
        part = to_tensor(found.crop(corners))[None]
        return self._flipped(to_pil(resize_map(part, condition, self.size[1], self.size[0])[0]))

    def _flipped(self, image: Image.Image) -> Image.Image:
        return ImageOps.mirror(image) if self.flip else image


@dataclass(frozen=True)
class Framing:
    """How pictures of any size become examples of a few sizes.

    Attributes:
        sizes: of the examples, one for each bucket.
        random_crop: cut at a random place instead of the centre.
        random_flip: exchange left and right in half of the examples.
    """

    sizes: tuple[Size, ...]
    random_crop: bool = False
    random_flip: bool = False

    @property
    def random(self) -> bool:
        """Whether an example shows something else every time."""
        return self.random_crop or self.random_flip

    def bucket(self, picture: Size) -> int:
        """The bucket of the aspect ratio that is nearest to the picture's."""
        return nearest_bucket(picture, self.sizes)

    def frame(self, picture: Size, bucket: int, rng: np.random.Generator) -> Frame:
        """The largest part of a picture that has the bucket's aspect ratio.

        Args:
            picture: its size.
            bucket: number of the size.
            rng: draws place and flip, if they are random, and is not used otherwise. A place lies a whole
                number of the example's pixels from the edge, so that a crop without resizing keeps pixels.
        """
        (width, height), (across, down) = self.sizes[bucket], picture
        box_width, box_height = min(across, down * width / height), min(down, across * height / width)
        scale = box_width / width
        free = (across - box_width, down - box_height)
        if self.random_crop:
            left, upper = (scale * int(rng.integers(math.floor(room / scale) + 1)) for room in free)
        else:
            left, upper = free[0] / 2, free[1] / 2
        flip = self.random_flip and bool(rng.integers(2))
        return Frame((left, upper, left + box_width, upper + box_height), picture, (width, height), flip)


def bucket_sizes(size: int, max_aspect_ratio: float, step: int) -> tuple[Size, ...]:
    """Sizes of about size x size pixels, never more: the square, and wider and higher ones.

    Sides are multiples of `step`, which is how NovelAI's aspect ratio bucketing (2022) chooses them.

    Args:
        size: side of the square, in pixels.
        max_aspect_ratio: greatest quotient of the longer and the shorter side; 1 gives the square alone.
        step: in pixels.

    Returns:
        The square, then the wide sizes, then the high ones; for each shorter side the largest size.
    """
    wide = []
    for short in range(step, size, step):
        long = step * (size * size // short // step)
        if size < long <= max_aspect_ratio * short:
            wide.append((long, short))
    return ((size, size), *wide, *((short, long) for long, short in wide))


def nearest_bucket(picture: Size, sizes: tuple[Size, ...]) -> int:
    """Number of the size whose aspect ratio is nearest to the picture's, by the logarithm."""
    wanted = math.log(picture[0] / picture[1])
    return min(
        range(len(sizes)), key=lambda number: abs(math.log(sizes[number][0] / sizes[number][1]) - wanted)
    )
