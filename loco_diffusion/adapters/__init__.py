"""Adapters that peft can use; importing this package registers them."""

from __future__ import annotations

from loco_diffusion.adapters.calibration import fit_supports
from loco_diffusion.adapters.hotswap import hotswap_adapter
from loco_diffusion.adapters.loca import LoCAConfig, LoCALayer, LoCAModel, LocationSchedule
from loco_diffusion.adapters.loco import LoCOConfig, LoCOLayer, LoCOModel
from loco_diffusion.adapters.loft import LOFTConfig, LOFTLayer, LOFTModel
from loco_diffusion.adapters.registry import register
from loco_diffusion.adapters.targets import default_target_modules

__all__ = [
    "LOFTConfig",
    "LOFTLayer",
    "LOFTModel",
    "LoCAConfig",
    "LoCALayer",
    "LoCAModel",
    "LoCOConfig",
    "LoCOLayer",
    "LoCOModel",
    "LocationSchedule",
    "default_target_modules",
    "fit_supports",
    "hotswap_adapter",
]

register("loco", LoCOConfig, LoCOModel)
register("loca", LoCAConfig, LoCAModel)
register("loft", LOFTConfig, LOFTModel)
