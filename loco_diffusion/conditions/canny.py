"""Canny edges."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Canny:
    """White one-pixel edges on black, by Canny's detector on the RGB picture (controlnet_aux, OpenCV).

    Attributes:
        low: weaker gradients are no edges (sum of absolute derivatives of the strongest channel).
        high: stronger gradients always are; those between the two are where they touch a stronger one.
    """

    low: int = 100
    high: int = 200
    name: ClassVar[str] = "canny"

    def extract(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """Edge map of an RGB picture: same size, RGB, every pixel 0 or 255; `rng` is not used."""
        pixels = np.asarray(image.convert("RGB"))
        height, width, _ = pixels.shape
        # The detector resizes to multiples of 64; a size that is one it leaves alone, and edges stay binary.
        padded = np.pad(pixels, ((0, -height % 64), (0, -width % 64), (0, 0)), mode="edge")
        side = min(padded.shape[:2])
        edges = _detector()(padded, self.low, self.high, detect_resolution=side, image_resolution=side)
        return Image.fromarray(np.ascontiguousarray(edges[:height, :width]))


@lru_cache(maxsize=1)
def _detector() -> Callable[..., Any]:
    """controlnet_aux takes seconds to import and warns about detectors that are not used here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from controlnet_aux import CannyDetector
    return CannyDetector()
