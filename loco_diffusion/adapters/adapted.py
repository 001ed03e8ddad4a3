"""A layer with adapters: all that does not depend on what a method does to the weight.

Names, settings, strength, devices, the way of activations through the layer, merging.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from loco_diffusion.errors import UserError


class _Called:
    """A container in which the layer's work can be done: offloading brings a module's tensors when it is called."""

    __call__ = nn.Module.__call__  # torch's containers refuse to be called

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        return work()


class _Parameters(_Called, nn.ParameterDict):
    pass


class _Buffers(_Called, BufferDict):
    pass


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A linear layer or ungrouped 2-d convolution, quantised or not, and its adapters by name.

    A method's subclass names its parameters, buffers and settings in ``adapter_layer_names`` (a ParameterDict
    each), ``buffer_names`` (a BufferDict each) and ``other_param_names`` (a dict each), and fills them in
    :meth:`update_layer`, between :meth:`_forget` and :meth:`_updated`; settings in :meth:`configure`. What it
    does is in :meth:`_adapt`, to the weight, and in :meth:`_enter` and :meth:`_leave`, to activations.

    Attributes, each a dict keyed by the adapter's name:
        r, alpha: the number of what is learned, and the factor on its effect, from the config.
        scaling: strength * :meth:`full_scale`.
    """

    adapter_layer_names: tuple[str, ...] = ()
    buffer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ("r", "alpha", "scaling")
    r: dict[str, int]
    alpha: dict[str, float]
    scaling: dict[str, float]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PeftConfig,
        quantization: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, _Parameters())
        for name in self.buffer_names:
            setattr(self, name, _Buffers(persistent=True))
        for name in self.other_param_names:
            setattr(self, name, {})
        self._disable_adapters = False
        # Peft switches it off for layerwise casting; activations are never cast here.
        self.cast_input_dtype_enabled = True
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        base = self.get_base_layer()
        self.is_convolution = isinstance(base, nn.Conv2d)
        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = _get_in_out_features(base)  # type: ignore[assignment]
        try:
            self.quantization_backend = resolve_quantization_backend(base, **(quantization or {}))
        except ValueError:  # torchao weights that peft cannot quantise again: everything but merging works
            self.quantization_backend = None
        self.update_layer(adapter_name, config)

    @property
    def groups(self) -> int:
        """The base convolution's; peft's LoRA asks for it when it is put around this layer."""
        return self.get_base_layer().groups  # type: ignore[return-value]

    # What a method supplies.

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add the adapter ``adapter_name``, or replace it."""
        raise NotImplementedError

    def configure(self, adapter: str, config: Any) -> None:
        """Take over the settings of a configuration that gives the parameters their present shapes."""
        raise NotImplementedError

    def full_scale(self, adapter: str) -> float:
        """The factor on what an adapter of strength 1 has learned."""
        return self.alpha[adapter] / self.r[adapter]

    def _adapt(self, weight: Tensor, adapter: str, scale: float, inverse: bool = False) -> Tensor:
        """W' from W, or W from W', with this factor instead of ``scaling``; float32 or float64, no gradients."""
        raise NotImplementedError

    def _enter(self, x: Tensor, adapters: list[str]) -> Tensor:
        """What these adapters make of the base layer's input."""
        return x

    def _leave(self, y: Tensor, x: Tensor, adapters: list[str]) -> Tensor:
        """What these adapters make of the base layer's output y, for the layer's input x."""
        return y

    # Adapters by name.

    def _forget(self, adapter: str) -> None:
        """What update_layer begins with: nothing stays of an adapter of this name."""
        for name in self.adapter_layer_names + self.buffer_names + self.other_param_names:
            if adapter in getattr(self, name):
                del getattr(self, name)[adapter]

    def _updated(self, adapter_name: str, config: PeftConfig) -> None:
        """What update_layer ends with: the base layer's device, and what is to be trained."""
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # peft's own also casts to the base layer's dtype. Half precision cannot hold small steps, and diffusers
        # never casts back, so the parameters stay in float32 here.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for container in (getattr(self, name) for name in self.adapter_layer_names + self.buffer_names):
            if device is not None and adapter_name in container and not container[adapter_name].is_meta:
                container[adapter_name] = container[adapter_name].to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, see peft's BaseTunerLayer, which does not know of buffers."""
        for container in (getattr(self, name) for name in self.buffer_names):
            if adapter_name in container:
                del container[adapter_name]
        super().delete_adapter(adapter_name)

    def _present(self, adapter_names: list[str]) -> list[str]:
        return [name for name in adapter_names if name in self.scaling]

    def _effective(self, adapter_names: list[str]) -> list[str]:
        # Strength 0 is skipped, not multiplied by, so that the base layer's result comes out bit for bit.
        return [name for name in self._present(adapter_names) if self.scaling[name] != 0]

    # Strength, as peft's LoRA and diffusers spell it.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter, which is 1 as trained."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.full_scale(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for adapter in self._present(self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo :meth:`scale_layer`; without ``scale``, reset the active adapters' strength to 1."""
        for adapter in self._present(self.active_adapters):
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    # The activations' path.

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The adapted layer.

        Args:
            x: (..., in_features), or (N, in_channels, H, W) for a convolution.
            args, kwargs: handed to the base layer.
            adapter_names: an adapter for each row of x instead of the active ones; a row whose name this layer
                does not have, "__base__" by convention, meets the base layer alone.

        Raises:
            UserError: adapter_names does not fit x, or adapters are merged.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if adapter_names is not None:
            return self._onloaded(partial(self._forward_mixed, x, adapter_names, *args, **kwargs))
        active = [] if self.disable_adapters or self.merged else self._effective(self.active_adapters)

        def work() -> Tensor:
            return self._leave(self.base_layer(self._enter(x, active), *args, **kwargs), x, active)

        return self._onloaded(work)

    def _onloaded(self, work: Callable[[], Tensor]) -> Tensor:
        """Do work that needs parameters or buffers, which sequential and group offloading keep elsewhere."""
        for name in self.adapter_layer_names + self.buffer_names:
            container = getattr(self, name)
            if "forward" in container.__dict__:  # put there by accelerate and diffusers
                work = partial(container, work)
        return work()

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            raise UserError(
                "adapter_names works on adapters that are not merged: call unmerge_adapter first."
            )
        if len(x) != len(adapter_names):
            raise UserError(
                f"adapter_names must name an adapter for each of {len(x)} rows, got {adapter_names}."
            )
        names = [] if self.disable_adapters else self._effective(list(dict.fromkeys(adapter_names)))
        rows = {name: [i for i, other in enumerate(adapter_names) if other == name] for name in names}
        entered = x.clone()
        for name, indices in rows.items():
            entered[indices] = self._enter(x[indices], [name]).to(x.dtype)
        y = self.base_layer(entered, *args, **kwargs)
        left = y.clone()
        for name, indices in rows.items():
            left[indices] = self._leave(y[indices], x[indices], [name]).to(y.dtype)
        return left

    # The weight's path.

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters into the base layer, computed in float32 and rounded back once.

        A merged bfloat16 weight is therefore W' to within 2^-8 of each entry (2^-11 in float16). Rounded twice,
        W comes back from :meth:`unmerge` to within 2^-7 of its norm after a rotation, not bit for bit.

        Args:
            safe_merge: check the merged weight for values that are not finite before writing it.
            adapter_names: which adapters, in this order; all active ones if None.

        Raises:
            UserError: the base layer cannot hold merged weights, or safe_merge found values not finite.
        """
        adapter_names = self._present(check_adapters_to_merge(self, adapter_names))
        if not adapter_names:
            return
        scales = {name: self.scaling[name] for name in adapter_names}
        effective = self._effective(adapter_names)
        if effective:
            weight, merged = self._float_weight()
            for name in effective:
                merged = self._adapt(merged, name, scales[name])
            if safe_merge and not torch.isfinite(merged).all():
                raise UserError(
                    f"Merging {', '.join(effective)} gives weights that are not finite: the adapter is broken, "
                    "train it again or load another."
                )
            self.set_base_weight(torch.empty_like(weight).copy_(merged))
        self.merged_adapters.extend(adapter_names)
        self._merged_scaling.update(scales)

    def unmerge(self) -> None:
        """Take every merged adapter out of the base layer again, at the strength it was merged with."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        effective = [name for name in reversed(self.merged_adapters) if self._merged_scaling[name] != 0]
        if effective:
            weight, restored = self._float_weight()
            for name in effective:
                restored = self._adapt(restored, name, self._merged_scaling[name], inverse=True)
            self.set_base_weight(torch.empty_like(weight).copy_(restored))
        self.merged_adapters.clear()
        self._merged_scaling.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W for the adapter at its present strength, of W's shape, in float32 (or float64).

        W is the base layer's weight as it is now: with merged adapters, the merged one.
        """
        _, weight = self._float_weight()
        return self._adapt(weight, adapter, self.scaling[adapter]) - weight

    def _float_weight(self) -> tuple[Tensor, Tensor]:
        """The base weight as it is and in float32 (or float64), (out, in) or (out, in, kh, kw)."""
        base, backend = self.get_base_layer(), self.quantization_backend
        weight: Tensor | None = None
        if backend is None:
            plain = getattr(base, "weight", torch.empty(0)).data
            if type(plain) is Tensor and plain.is_floating_point():
                weight = plain
        elif backend.supports_merge:
            with suppress(NotImplementedError):  # torchao's types that cannot be dequantised
                weight = self.get_base_weight()
        if weight is None or weight.shape[:2] != (self.out_features, self.in_features):
            raise UserError(
                f"Cannot merge into the weights of a quantised {type(base).__name__}: load the base model without "
                "quantisation to merge."
            )
        return weight, weight.to(torch.promote_types(weight.dtype, torch.float32))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True, for peft: W' - W is well defined."""
        return True
