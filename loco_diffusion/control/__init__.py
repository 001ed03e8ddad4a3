"""How a condition reaches a frozen denoiser."""

from __future__ import annotations

from loco_diffusion.control.adapter import AdapterInfo
from loco_diffusion.control.controller import Controller
from loco_diffusion.control.encoder import ConditionEncoder, EncoderConfig, TokensConfig
from loco_diffusion.control.family import Family, family_of
from loco_diffusion.control.map_tokens import MapTokens, map_tokens
from loco_diffusion.control.maps import ConditionMap, map_tensor, resize_map
from loco_diffusion.control.pipeline import ControlledPipeline
from loco_diffusion.control.preparation import CacheSettings

__all__ = [
    "AdapterInfo",
    "CacheSettings",
    "ConditionEncoder",
    "ConditionMap",
    "ControlledPipeline",
    "Controller",
    "EncoderConfig",
    "Family",
    "MapTokens",
    "TokensConfig",
    "family_of",
    "map_tensor",
    "map_tokens",
    "resize_map",
]
