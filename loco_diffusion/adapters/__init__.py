"""Adapters that peft can use; importing this package registers them."""

from __future__ import annotations

from loco_diffusion.adapters.loco import LoCOConfig, LoCOLayer, LoCOModel
from loco_diffusion.adapters.registry import register
from loco_diffusion.adapters.targets import default_target_modules

__all__ = ["LoCOConfig", "LoCOLayer", "LoCOModel", "default_target_modules"]

register("loco", LoCOConfig, LoCOModel)
