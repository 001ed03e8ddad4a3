"""Another adapter's weights in the place of an adapter's, without new tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from loco_diffusion.adapters import peft_folder
from loco_diffusion.adapters.loco.config import LoCOConfig
from loco_diffusion.adapters.loco.layer import LoCOLayer
from loco_diffusion.adapters.peft_folder import PEFT_PREFIX
from loco_diffusion.errors import UserError


def hotswap_adapter(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Give an adapter the weights and settings of a saved LoCO adapter of the same shapes.

    No parameter is replaced, so that a compiled model stays compiled; it only compiles again where alpha / r
    differs. The adapter keeps its name and its strength. Does for LoCO what ``peft.utils.hotswap`` does for LoRA
    alone.

    Args:
        model: a PeftModel, or a model with injected adapters.
        folder: what ``save_pretrained`` wrote, or the id of a repository on the hub.
        adapter_name: the adapter to overwrite.

    Raises:
        UserError: there is no such adapter, it is merged, or the other one is missing, damaged, not LoCO or of
            other shapes.
    """
    model = getattr(model, "_orig_mod", model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = {
        path: layer
        for path, layer in base.named_modules()
        if isinstance(layer, LoCOLayer) and adapter_name in layer.scaling
    }
    if not layers:
        raise UserError(f"The model has no LoCO adapter {adapter_name!r} to swap: load it as a new adapter.")
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise UserError(f"The adapter {adapter_name!r} is merged into the base weights: unmerge it first.")
    other = peft_folder.read(peft_folder.find(folder))
    config = other.method
    if not isinstance(config, LoCOConfig):
        raise UserError(f"{folder} holds a {type(config).__name__}: only LoCO adapters can be swapped.")
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
    configs: Any = model.peft_config
    configs[adapter_name] = config
