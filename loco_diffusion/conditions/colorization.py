"""A gray picture to colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Colorization:
    """The picture's luma, (299 R + 587 G + 114 B) / 1000 after ITU-R 601."""

    name: ClassVar[str] = "colorization"

    def extract(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """Gray version of an RGB picture, same size, as RGB; `rng` is not used."""
        return image.convert("L").convert("RGB")
