"""LoCO: low-rank compositional orthogonal adaptation."""

from __future__ import annotations

from loco_diffusion.adapters.loco.config import LoCOConfig
from loco_diffusion.adapters.loco.layer import LoCOLayer
from loco_diffusion.adapters.loco.model import LoCOModel

__all__ = ["LoCOConfig", "LoCOLayer", "LoCOModel"]
