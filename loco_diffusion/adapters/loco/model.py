"""LoCO as a peft tuner."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from torch import nn

from loco_diffusion.adapters.loco.config import LoCOConfig
from loco_diffusion.adapters.loco.layer import Linear, LoCOLayer
from loco_diffusion.adapters.targets import TARGET_MODULES, default_target_modules
from loco_diffusion.errors import UserError


class LoCOModel(BaseTuner):
    """Puts LoCO layers around the target layers of a model; peft makes one to add or load an adapter."""

    prefix: str = "loco_"
    tuner_layer_cls = LoCOLayer
    # peft's own mapping is by transformers' model_type; the denoisers' defaults are in adapters/targets.py.
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, LoCOConfig)
        if peft_config.target_modules is None:
            model_class = type(getattr(self.model, "_orig_mod", self.model)).__name__
            targets = default_target_modules(model_class)
            if targets is None:
                raise UserError(
                    f"LoCO has no default target_modules for {model_class} (only for "
                    f"{', '.join(TARGET_MODULES)}): set LoCOConfig.target_modules to its linear layers."
                )
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, LoCOConfig)
        if isinstance(target, LoCOLayer):
            target.update_layer(adapter_name, peft_config, inference_mode=peft_config.inference_mode)
            return
        quantization = get_quantization_kwargs(self)
        if not _is_linear(target, quantization):
            raise UserError(
                f"LoCO adapts linear layers, but the target {current_key!r} is a {type(target).__name__}: "
                "leave it out of target_modules or name it in exclude_modules."
            )
        layer = Linear(target, adapter_name, peft_config, quantization)
        if adapter_name not in self.active_adapters:
            # an additional adapter is not trainable until it is made active
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype:
            return
        # The layers create float32 parameters, so the user's wish for the base layer's dtype is met here.
        for layer in self.model.modules():
            if not isinstance(layer, LoCOLayer) or adapter_name not in layer.loco_u:
                continue
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            if dtype is not None and dtype.is_floating_point:
                for parameters in (layer.loco_u, layer.loco_v):
                    parameters[adapter_name] = parameters[adapter_name].to(dtype)


def _is_linear(target: nn.Module, quantization: dict[str, Any]) -> bool:
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(layer, nn.Linear):
        return True
    backend = resolve_quantization_backend(layer, **quantization)
    return backend is not None and backend.layer_type == "linear"
