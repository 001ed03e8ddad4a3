"""A linear layer whose inputs are rotated by a chain of low-rank rotations."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from loco_diffusion import rotations
from loco_diffusion.adapters.loco.config import LoCOConfig
from loco_diffusion.errors import UserError


class _CachedChain(NamedTuple):
    """A chain, what it was computed from, and the storage that the stamp's addresses point into."""

    stamp: tuple[Any, ...]
    chain: tuple[Tensor, Tensor]
    alive: tuple[Tensor, Tensor]  # while these live, no other tensor can get the addresses in the stamp


class LoCOLayer(BaseTunerLayer):
    """What a layer needs to live inside peft and diffusers: parameters, scale, adapters by name.

    Attributes, each a dict keyed by the adapter's name:
        loco_u, loco_v: parameters, (num_rotations, in_features, r), float32 unless cast.
        r, alpha, num_rotations, chain_order, rotation_map: from the config.
        scaling: strength * alpha / r, the factor on every angle.
    """

    training: bool  # torch.nn.Module's
    adapter_layer_names: tuple[str, ...] = ("loco_u", "loco_v")
    other_param_names: tuple[str, ...] = (
        "r",
        "alpha",
        "num_rotations",
        "chain_order",
        "rotation_map",
        "scaling",
    )

    def __init__(self, base_layer: nn.Module, quantization: dict[str, Any] | None = None) -> None:
        self.base_layer = base_layer
        self.loco_u = nn.ParameterDict()
        self.loco_v = nn.ParameterDict()
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.num_rotations: dict[str, int] = {}
        self.chain_order: dict[str, rotations.ChainOrder] = {}
        self.rotation_map: dict[str, rotations.RotationMap] = {}
        self.scaling: dict[str, float] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._merged_scaling: dict[str, float] = {}
        self._chains: dict[str, _CachedChain] = {}
        self.in_features: int
        self.out_features: int
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())  # type: ignore[assignment]
        try:
            self.quantization_backend = resolve_quantization_backend(
                self.get_base_layer(), **(quantization or {})
            )
        except ValueError:  # torchao weights that peft cannot quantise again: everything but merging works
            self.quantization_backend = None

    def update_layer(self, adapter_name: str, config: LoCOConfig, inference_mode: bool = False) -> None:
        """Add the adapter ``adapter_name``, or replace it.

        Raises:
            UserError: the rotations together have more directions than the layer has inputs.
        """
        width = 2 * config.r * config.num_rotations
        if width > self.in_features:
            raise UserError(
                f"LoCO needs 2 * r * num_rotations <= in_features, but {width} (r = {config.r}, "
                f"num_rotations = {config.num_rotations}) exceeds the {self.in_features} inputs of a target "
                "layer: lower r or num_rotations, or leave that layer out of target_modules."
            )
        assert config.alpha is not None  # __post_init__ has filled it in
        self.r[adapter_name] = config.r
        self.alpha[adapter_name] = config.alpha
        self.num_rotations[adapter_name] = config.num_rotations
        self.chain_order[adapter_name] = config.chain_order
        self.rotation_map[adapter_name] = config.map
        self.scaling[adapter_name] = config.alpha / config.r
        self._chains.pop(adapter_name, None)

        shape = (config.num_rotations, self.in_features, config.r)
        u = nn.functional.normalize(torch.randn(shape), dim=1)
        v = torch.zeros(shape)
        if not config.init_weights:
            v = 0.1 * nn.functional.normalize(torch.randn(shape), dim=1)
        self.loco_u[adapter_name] = nn.Parameter(u)
        self.loco_v[adapter_name] = nn.Parameter(v)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # peft's own also casts to the base layer's dtype. Half precision cannot hold small steps of the
        # angles, and diffusers never casts back, so the parameters stay in float32 here.
        if device is None:
            device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for parameters in (self.loco_u, self.loco_v):
            if device is not None and adapter_name in parameters and not parameters[adapter_name].is_meta:
                parameters[adapter_name] = parameters[adapter_name].to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; see peft's BaseTunerLayer."""
        self._chains.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    # Strength, as peft's LoRA and diffusers spell it.

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter: every angle becomes ``scale`` times the trained one."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

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

    def _present(self, adapter_names: list[str]) -> list[str]:
        return [name for name in adapter_names if name in self.loco_u]

    # The chains.

    def get_chain(self, adapter: str, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """The adapter's rotation R = I + B T B^T at its present strength, differentiable.

        Args:
            adapter: its name.
            scale: use this factor on the angles instead of ``scaling[adapter]``.

        Returns:
            B: (in_features, 2 * r * num_rotations) and T, square; float32 (float64 for float64 parameters).
        """
        return rotations.chain(
            self.loco_u[adapter],
            self.loco_v[adapter],
            self.scaling[adapter] if scale is None else scale,
            self.rotation_map[adapter],
            self.chain_order[adapter],
        )

    def _chain_for_forward(self, adapter: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The chain in the activations' dtype; in evaluation it is kept until what it is made of changes."""
        u, v = self.loco_u[adapter], self.loco_v[adapter]
        if (
            torch.compiler.is_compiling()  # the tracer must not see versions and addresses
            or self.training
            or (torch.is_grad_enabled() and (u.requires_grad or v.requires_grad))
            or u.is_inference()  # inference tensors do not count their changes
            or v.is_inference()
        ):
            basis, core = self.get_chain(adapter)
            return basis.to(dtype), core.to(dtype)
        stamp = (
            dtype,
            self.scaling[adapter],
            self.rotation_map[adapter],
            self.chain_order[adapter],
            *((p._version, p.data_ptr(), p.dtype, p.device) for p in (u, v)),
        )
        cached = self._chains.get(adapter)
        if cached is None or cached.stamp != stamp:
            # Outside inference mode, so that a later forward with gradients can use these tensors as well.
            with torch.inference_mode(False), torch.no_grad():
                basis, core = self.get_chain(adapter)
                cached = _CachedChain(stamp, (basis.to(dtype), core.to(dtype)), (u.detach(), v.detach()))
            self._chains[adapter] = cached
        return cached.chain

    def clear_chains(self) -> None:
        """Forget the kept chains; needed only after writes into ``parameter.data``, which leave no trace."""
        self._chains.clear()


class Linear(nn.Module, LoCOLayer):
    """Any linear layer, quantised ones included, with rotated inputs: y = W R x + b."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoCOConfig,
        quantization: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        LoCOLayer.__init__(self, base_layer, quantization)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Rotate x: (..., in_features) and hand it, with all further arguments, to the base layer."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif not self.merged:
            x = self._rotate(x)
        return self.base_layer(x, *args, **kwargs)

    def _rotate(self, x: Tensor) -> Tensor:
        # W R_a R_b x: the adapter that was activated last is the first that x meets. Strength 0 is skipped,
        # not multiplied by, so that the base layer's result comes out bit for bit.
        adapters = [name for name in reversed(self._present(self.active_adapters)) if self.scaling[name] != 0]
        if not adapters:
            return x
        previous = x.dtype
        device = x.device.type
        if torch.is_autocast_enabled(device) and previous != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        for adapter in adapters:
            x = rotations.apply(x, *self._chain_for_forward(adapter, x.dtype))
        # Under autocast a plain layer casts its input to this dtype anyway; others may look at what they get.
        return x if self.quantization_backend is None else x.to(previous)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W R_1 R_2 ... into the base layer, computed in float32 and cast back once.

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
        turning = [name for name in adapter_names if scales[name] != 0]
        if turning:
            weight, merged = self._float_weight()
            for name in turning:
                merged = self._times_rotation(merged, name, scales[name])
            if safe_merge and not torch.isfinite(merged).all():
                raise UserError(
                    f"Merging {', '.join(turning)} gives weights that are not finite: the adapter is broken, "
                    "train it again or load another."
                )
            self.set_base_weight(merged.to(weight.dtype))
        self.merged_adapters.extend(adapter_names)
        self._merged_scaling.update(scales)

    def unmerge(self) -> None:
        """Take every merged adapter out of the base layer again, at the strength it was merged with."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        turning = [name for name in reversed(self.merged_adapters) if self._merged_scaling[name] != 0]
        if turning:
            weight, restored = self._float_weight()
            for name in turning:
                restored = self._times_rotation(restored, name, self._merged_scaling[name], inverse=True)
            self.set_base_weight(restored.to(weight.dtype))
        self.merged_adapters.clear()
        self._merged_scaling.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W R - W for the adapter at its present strength: (out_features, in_features), float32 (or float64).

        W is the base layer's weight as it is now: with merged adapters, the merged one.
        """
        _, weight = self._float_weight()
        with torch.autocast(weight.device.type, enabled=False):
            basis, core = (t.to(weight) for t in self.get_chain(adapter))
            return weight @ basis @ core @ basis.mT

    def _float_weight(self) -> tuple[Tensor, Tensor]:
        """The base weight as it is and in float32 (or float64), (out_features, in_features)."""
        weight = self.get_base_weight()
        plain = type(weight) is Tensor and weight.is_floating_point()
        if self.quantization_backend is None and not (
            plain and weight.shape == (self.out_features, self.in_features)
        ):
            raise UserError(
                f"Cannot merge into a {type(self.get_base_layer()).__name__} with {weight.dtype} weights: "
                "load the base model without quantisation to merge."
            )
        return weight, weight.to(torch.promote_types(weight.dtype, torch.float32))

    def _times_rotation(self, weight: Tensor, adapter: str, scale: float, inverse: bool = False) -> Tensor:
        """W R, or W R^-1."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            basis, core = (t.to(weight) for t in self.get_chain(adapter, scale))
            if inverse:
                core = rotations.inverse_core(basis, core)
            return rotations.apply(weight, basis, core.mT)

    def train(self, mode: bool = True) -> Linear:
        """As in torch; training keeps no chains."""
        if mode:
            self.clear_chains()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Linear:
        # Every move to a device or dtype comes through here.
        self.clear_chains()
        return super()._apply(fn, recurse)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """True: W R - W has rank 2 * r * num_rotations at most."""
        return True

    def __repr__(self) -> str:
        return "loco." + super().__repr__()
