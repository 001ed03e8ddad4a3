"""LoCA as a peft tuner."""

from __future__ import annotations

import torch

from loco_diffusion.adapters.loca.layer import Conv2d, Linear, LoCALayer
from loco_diffusion.adapters.tuner import AdapterModel


class LoCAModel(AdapterModel):
    """Puts LoCA layers around the target layers of a model; see :class:`AdapterModel`."""

    prefix: str = "loca_"
    tuner_layer_cls = LoCALayer
    layer_types = {"linear": Linear, "conv2d": Conv2d}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        # Locations stay in float32, as in LoCALayer._apply.
        for layer in self.model.modules():
            if isinstance(layer, LoCALayer) and adapter_name in layer.loca_l:
                location = layer.loca_l[adapter_name]
                location.data = location.data.to(torch.promote_types(location.dtype, torch.float32))
