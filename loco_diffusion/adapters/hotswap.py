"""Another adapter's weights in the place of an adapter's, without new tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from loco_diffusion.adapters import peft_folder
from loco_diffusion.adapters.adapted import AdaptedLayer
from loco_diffusion.adapters.config import AdapterConfig
from loco_diffusion.adapters.peft_folder import PEFT_PREFIX
from loco_diffusion.errors import UserError


def hotswap_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Give an adapter the weights and settings of a saved one of the same method and shapes.

    No parameter is replaced, so that a compiled model stays compiled; it only compiles again where a setting
    such as alpha / r differs. The adapter keeps its name and its strength. Does for this library's methods what
    ``peft.utils.hotswap`` does for LoRA alone.

    Args:
        model: a PeftModel, or a model with injected adapters.
        folder: what ``save_pretrained`` wrote, or the id of a repository on the hub.
        adapter_name: the adapter to overwrite.

    Raises:
        UserError: there is no such adapter, it is merged, or the other one is missing, damaged, of another
            method or of other shapes.
    """
    model = getattr(model, "_orig_mod", model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {
        path: layer
        for path, layer in base.named_modules()
        if isinstance(layer, AdaptedLayer) and adapter_name in layer.scaling
    }
    if not layers:
        raise UserError(f"The model has no adapter {adapter_name!r} to swap: load it as a new adapter.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise UserError(f"The adapter {adapter_name!r} is merged into the base weights: unmerge it first.")
    other = peft_folder.read(peft_folder.find(folder))
    config = other.method
    configs: Any = model.peft_config
    if not isinstance(config, AdapterConfig) or type(config) is not type(configs[adapter_name]):
        raise UserError(
            f"{folder} holds a {type(config).__name__}, the adapter {adapter_name!r} is made from a "
            f"{type(configs[adapter_name]).__name__}: load it as a new adapter."
        )
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    weights = {prefix + name: tensor for name, tensor in other.adapter.items()}
    present = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    different = {(name, tensor.shape) for name, tensor in weights.items()} ^ {
        (name, tensor.shape) for name, tensor in present.items()
    }
    if different:
        raise UserError(
            f"{folder} differs from the adapter {adapter_name!r} in layers or shapes ({min(different)[0]} first): "
            "load it as a new adapter."
        )
    set_peft_model_state_dict(model, weights, adapter_name=adapter_name)
    for path, layer in layers.items():
        strength = layer.scaling[adapter_name] / layer.full_scale(adapter_name)
        layer.configure(adapter_name, config.for_layer(path))
        layer.set_scale(adapter_name, strength)
    configs[adapter_name] = config
