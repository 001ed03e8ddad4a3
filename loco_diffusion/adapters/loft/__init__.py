"""LOFT: low-rank orthogonal fine-tuning in a chosen subspace."""

from __future__ import annotations

from loco_diffusion.adapters.loft.config import LOFTConfig
from loco_diffusion.adapters.loft.layer import LOFTLayer
from loco_diffusion.adapters.loft.model import LOFTModel

__all__ = ["LOFTConfig", "LOFTLayer", "LOFTModel"]
