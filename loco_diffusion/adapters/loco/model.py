"""LoCO as a peft tuner."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loco_diffusion.adapters.combine import COMBINATIONS, Combination, merge_adapters
from loco_diffusion.adapters.loco.layer import Conv2d, Linear, LoCOLayer
from loco_diffusion.adapters.tuner import AdapterModel
from loco_diffusion.errors import UserError


class LoCOModel(AdapterModel):
    """Puts LoCO layers around the target layers of a model; see :class:`AdapterModel`."""

    prefix: str = "loco_"
    tuner_layer_cls = LoCOLayer
    layer_types = {"linear": Linear, "conv2d": Conv2d}

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Combination = "lie",
    ) -> None:
        """Add an adapter that does what several do together, see :func:`combine.merge_adapters`.

        Args:
            adapters: names of adapters, in the order in which they would be activated.
            weights: a strength for each of them, also negative ones.
            adapter_name: a new name.
            combination_type: "lie", the weighted sum of the generators, or "compose", the product of the
                rotations.

        Raises:
            UserError: names or numbers do not fit, or the adapters cannot be combined.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or len(adapters) != len(weights) or adapter_name in self.peft_config:
            raise UserError(
                f"add_weighted_adapter takes existing adapters ({', '.join(self.peft_config)}), a weight for each, "
                f"and a new name, got {adapters}, {weights} and {adapter_name!r}."
            )
        if combination_type not in COMBINATIONS:
            raise UserError(
                f"combination_type must be one of {', '.join(COMBINATIONS)}, got {combination_type!r}."
            )
        parts = [(self.peft_config[name], dict(self._weights_of(name))) for name in adapters]
        config, merged = merge_adapters(parts, combination_type, weights)
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        with torch.no_grad():
            for name, parameter in self._weights_of(adapter_name):
                parameter.copy_(merged[name])

    def _weights_of(self, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
        """An adapter's parameters by names such as ``path.to.layer.loco_u``."""
        for path, layer in self.model.named_modules():
            for kind in layer.adapter_layer_names if isinstance(layer, LoCOLayer) else ():
                if adapter_name in getattr(layer, kind):
                    yield f"{path}.{kind}", getattr(layer, kind)[adapter_name]
