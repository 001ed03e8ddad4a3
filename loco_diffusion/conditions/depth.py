"""Depth, by any depth-estimation network of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from PIL import Image

from loco_diffusion.embedded import packaged_depth_network
from loco_diffusion.errors import UserError

if TYPE_CHECKING:
    from transformers import DepthEstimationPipeline

FLAT = 1e-5
"""A relative range below this is rounding, not depth; stretched, it would be a map of noise."""

_loading = Lock()


@dataclass(frozen=True)
class Depth:
    """The depth map of a network, stretched per picture from its minimum (black) to its maximum (white).

    Attributes:
        model: hub id or folder of a depth-estimation model, such as "LiheYoung/depth-anything-small-hf";
            None for the packaged network. It is loaded on first use, in float32, and kept.
        device: torch device of the network, such as "cuda"; None for transformers' choice.
    """

    model: str | None = None
    device: str | None = None
    name: ClassVar[str] = "depth"

    def extract(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """Depth map of an RGB picture: same size, 8-bit gray as RGB; `rng` is not used.

        A picture of constant depth gives a black map.

        Raises:
            UserError: the network cannot be loaded, or predicts NaN or infinity.
        """
        estimator = _load(self.model or str(packaged_depth_network()), self.device)
        with torch.inference_mode(), np.errstate(invalid="ignore", divide="ignore"):  # 0/0 on constant depth
            result = estimator(image.convert("RGB"))
        depth = result["predicted_depth"]
        if not bool(depth.isfinite().all()):
            raise UserError("The depth network predicts NaN or infinity; replace its damaged weights.")
        if bool(depth.max() - depth.min() <= FLAT * depth.abs().max()):
            return Image.new("RGB", image.size)
        return result["depth"].convert("RGB")


def _load(model: str, device: str | None) -> DepthEstimationPipeline:
    with _loading:  # a web server asks from several threads; load once
        return _load_once(model, device)


@lru_cache(maxsize=2)
def _load_once(model: str, device: str | None) -> DepthEstimationPipeline:
    from transformers import pipeline

    try:
        return pipeline("depth-estimation", model=model, device=device, dtype=torch.float32)
    except Exception as error:  # transformers reports a bad id, folder, task or file by many exception types
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"The depth network {model} cannot be loaded ({cause}); "
            "give the hub id or folder of a depth-estimation model."
        ) from error
