"""What the methods' peft tuners share: finding target layers, wrapping them, adapters by row of a batch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    AuxiliaryTrainingWrapper,
    NoMatchingPeftModuleError,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from loco_diffusion.adapters.adapted import AdaptedLayer
from loco_diffusion.adapters.config import AdapterConfig
from loco_diffusion.adapters.targets import DEFAULT_PRESET, DENOISERS, PRESETS, default_target_modules
from loco_diffusion.errors import UserError


class AdapterModel(BaseTuner):
    """Puts a method's layers around the target layers of a model; peft makes one to add or load an adapter.

    A method's subclass sets ``prefix``, ``tuner_layer_cls`` and ``layer_types``.
    """

    tuner_layer_cls: type[AdaptedLayer]
    layer_types: dict[str, type[AdaptedLayer]] = {}
    """The layer class for each kind of base layer, "linear" and "conv2d"."""
    # peft's own mapping is by transformers' model_type; the denoisers' defaults are in adapters/targets.py.
    target_module_mapping: dict[str, list[str]] = {}

    @property
    def method(self) -> str:
        """The method's name, for messages."""
        return type(self).__name__.removesuffix("Model")

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As in peft.

        Raises:
            UserError: no layer of the model matches the configuration.
        """
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except NoMatchingPeftModuleError as error:
            config = self.peft_config[adapter_name]
            assert isinstance(config, AdapterConfig)
            raise UserError(
                f"{self.method} found nothing to adapt in {_class_name(model)}: target_modules "
                f"{config.target_modules!r} matches no layer that exclude_modules, layers_to_transform and "
                "modules_to_save leave; see model.named_modules() for the names."
            ) from error

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        assert isinstance(peft_config, AdapterConfig)
        targets, model_class = peft_config.target_modules, _class_name(self.model)
        if targets is None or (isinstance(targets, str) and targets in PRESETS):
            known = default_target_modules(model_class, targets or DEFAULT_PRESET)
            if known is not None:
                peft_config.target_modules = known
            elif targets != "all-linear":  # peft finds the linear layers of any model itself
                raise UserError(
                    f"{self.method} has no default target_modules for {model_class} (only for "
                    f"{', '.join(DENOISERS)}): set {self.method}Config.target_modules to its linear layers."
                )
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> bool | re.Match[str] | None:
        found = BaseTuner._check_target_module_exists(peft_config, key)
        assert isinstance(peft_config, AdapterConfig)
        indices = peft_config.layers_to_transform
        if not found or indices is None or not isinstance(peft_config.target_modules, str):
            return found
        # peft looks at the block's index only where target_modules is a list.
        patterns = peft_config.layers_pattern or r"[^.]*"
        names = "|".join([patterns] if isinstance(patterns, str) else patterns)
        block = re.match(rf"(?:.*?\.)?(?:{names})\.(\d+)\.", key)
        return block is not None and int(block[1]) in ([indices] if isinstance(indices, int) else indices)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, AdapterConfig)
        config = peft_config.for_layer(current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config)
            return
        quantization = get_quantization_kwargs(self)
        layer_cls = self.layer_types.get(_kind(target, quantization))
        if layer_cls is None:
            raise UserError(
                f"{self.method} adapts linear layers and ungrouped 2-d convolutions, but the target "
                f"{current_key!r} is a {type(target).__name__}: leave it out of target_modules or name it in "
                "exclude_modules."
            )
        layer = layer_cls(target, adapter_name, config, quantization)
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
            if not isinstance(layer, self.tuner_layer_cls):
                continue
            _, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            for container in (getattr(layer, name) for name in layer.adapter_layer_names):
                if adapter_name in container and dtype is not None and dtype.is_floating_point:
                    container[adapter_name] = container[adapter_name].to(dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand the call's ``adapter_names`` to every adapted layer while it lasts.

        Raises:
            UserError: the model is in training mode, or has no such adapter.
        """
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if self.training:
            raise UserError("adapter_names works in evaluation mode only: call model.eval() first.")
        unknown = sorted(set(adapter_names) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise UserError(
                f"There is no adapter {', '.join(unknown)}: adapter_names may use "
                f"{', '.join(self.peft_config)} and __base__."
            )

        def hand_over(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, "adapter_names": adapter_names}

        handles = [
            module.register_forward_pre_hook(hand_over, with_kwargs=True)
            for module in self.modules()
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _class_name(model: nn.Module) -> str:
    return type(getattr(model, "_orig_mod", model)).__name__


def _kind(target: nn.Module, quantization: dict[str, Any]) -> str:
    layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "bypassed"  # torch's own attention reads its weight and never calls it
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Conv2d):
        return "conv2d" if layer.groups == 1 else "grouped"
    backend = resolve_quantization_backend(layer, **quantization)
    return "unknown" if backend is None else backend.layer_type
