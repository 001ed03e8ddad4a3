"""LoCO as a peft tuner."""

from __future__ import annotations

from loco_diffusion.adapters.loco.layer import Conv2d, Linear, LoCOLayer
from loco_diffusion.adapters.tuner import AdapterModel


class LoCOModel(AdapterModel):
    """Puts LoCO layers around the target layers of a model; see :class:`AdapterModel`."""

    prefix: str = "loco_"
    tuner_layer_cls = LoCOLayer
    layer_types = {"linear": Linear, "conv2d": Conv2d}
