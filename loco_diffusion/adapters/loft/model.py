"""LOFT as a peft tuner."""

from __future__ import annotations

from loco_diffusion.adapters.loft.layer import Conv2d, Linear, LOFTLayer
from loco_diffusion.adapters.tuner import AdapterModel


class LOFTModel(AdapterModel):
    """Puts LOFT layers around the target layers of a model; see :class:`AdapterModel`."""

    prefix: str = "loft_"
    tuner_layer_cls = LOFTLayer
    layer_types = {"linear": Linear, "conv2d": Conv2d}
