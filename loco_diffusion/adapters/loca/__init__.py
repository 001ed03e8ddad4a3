"""LoCA: location-aware cosine adaptation."""

from __future__ import annotations

from loco_diffusion.adapters.loca.config import LoCAConfig
from loco_diffusion.adapters.loca.layer import LoCALayer
from loco_diffusion.adapters.loca.model import LoCAModel
from loco_diffusion.adapters.loca.schedule import LocationSchedule

__all__ = ["LoCAConfig", "LoCALayer", "LoCAModel", "LocationSchedule"]
