"""Layers whose input or output channels are rotated: all of a method but what its rotations are made from.

    W' = D_out R_out W R_in D_in        R = I + B T B^T on each side, D = diag(m) a learned magnitude

The bias stays what it is. Several adapters a, b on one layer apply in the order of their activation: merging
a, then b, turns the inputs by R_a R_b and the outputs by R_b R_a, and so does the forward pass.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from peft import PeftConfig
from torch import Tensor, nn
from torch.nn import functional

from loco_diffusion import rotations
from loco_diffusion.adapters.adapted import AdaptedLayer
from loco_diffusion.adapters.optimizer_steps import optimizer_steps
from loco_diffusion.errors import UserError

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")  # in the order in which activations meet them


class _Factors(NamedTuple):
    """What activations need of an adapter on one side, in their dtype."""

    rotation: tuple[Tensor, Tensor] | None  # B: (n, w) and T: (w, w)
    gain: Tensor | None  # m - 1: (n,); half precision would round a small change of m itself away


class _Kept(NamedTuple):
    """Factors, what they were computed from, and the storage that the stamp's addresses point into."""

    stamp: tuple[Any, ...]
    factors: _Factors
    alive: list[Tensor]  # while these live, no other tensor can get the addresses in the stamp


class RotatedLayer(AdaptedLayer):
    """An adapted layer, W' as above.

    A method's subclass supplies, beside what :class:`AdaptedLayer` asks for, :meth:`get_chain` and, where its
    own differs, :meth:`sides`, :meth:`get_magnitude`, :meth:`needs_gradient` and :meth:`fit`. Its settings, the
    values in ``other_param_names``, compare with ``==``.

    In evaluation (B, T) and D are computed once and kept until what they are made of changes. Two exceptions:
    writes into ``parameter.data``, such as those of diffusers' ``EMAModel.copy_to``, and a compiled step of a
    fused optimizer leave no trace, so call ``eval()`` on the model (or :meth:`clear_chains`) after them; and a
    compiled layer computes them on every call, because a compiled graph cannot look for changes.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: PeftConfig,
        quantization: dict[str, Any] | None = None,
    ) -> None:
        self._kept: dict[tuple[str, Side], _Kept] = {}
        # By adapter, side and dtype: B and T that come from elsewhere for a while; see loco/together.py.
        self.given_rotations: dict[tuple[str, Side, torch.dtype], tuple[Tensor, Tensor]] = {}
        super().__init__(base_layer, adapter_name, config, quantization)

    # What a method supplies.

    def sides(self, adapter: str) -> tuple[Side, ...]:
        """Where the adapter rotates."""
        return ("input",)

    def get_chain(
        self, adapter: str, side: Side = "input", scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The rotation R = I + B T B^T of one of the adapter's sides, differentiable.

        Args:
            adapter: its name.
            side: one of :meth:`sides`.
            scale: use this factor on the angles instead of ``scaling[adapter]``.

        Returns:
            B: (n, w) and T: (w, w) for the n channels of that side; float32, or float64 for float64 parameters.
        """
        raise NotImplementedError

    def get_magnitude(self, adapter: str, side: Side, scale: float | None = None) -> Tensor | None:
        """The factor m on each channel of a side, positive, 1 at scale 0; None if the adapter has none.

        Args:
            adapter, scale: as for :meth:`get_chain`.
            side: any.

        Returns:
            (n,), in float32, or float64 for float64 parameters.
        """
        return None

    def needs_gradient(self, adapter: str) -> bool:
        """Whether the adapter is to be fitted to a gradient before it trains, see :meth:`fit`."""
        return False

    def fit(self, adapter: str, gradient: Tensor) -> None:
        """Choose what the adapter turns from the loss's gradient with respect to the base weight, of its shape."""
        raise NotImplementedError

    def channels(self, side: Side) -> int:
        """n, the number of channels on a side."""
        return self.in_features if side == "input" else self.out_features

    # The activations' path.

    def _enter(self, x: Tensor, adapters: list[str]) -> Tensor:
        # W R_a R_b x: the adapter that was activated last is the first that x meets.
        return self._turn(x, "input", adapters[::-1])

    def _leave(self, y: Tensor, x: Tensor, adapters: list[str]) -> Tensor:
        return self._turn(y, "output", adapters)

    def _turn(self, x: Tensor, side: Side, adapters: list[str]) -> Tensor:
        previous = dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        bias = _bias_of(self.get_base_layer()) if side == "output" else None
        for adapter in adapters:
            rotation, gain = self._factors(adapter, side, dtype)
            if rotation is None and gain is None:
                continue
            x = x.to(dtype)
            bias = None if bias is None else bias.to(x)
            if side == "input" and gain is not None:
                x = self._scale(x, gain, bias)
            if rotation is not None:
                x = self._rotate(x, *rotation, bias)
            if side == "output" and gain is not None:
                x = self._scale(x, gain, bias)
        # Under autocast a plain layer casts its input to this dtype anyway; others may look at what they get.
        return x if self.quantization_backend is None else x.to(previous)

    def _rotate(self, x: Tensor, basis: Tensor, core: Tensor, bias: Tensor | None) -> Tensor:
        """R (x - b) + b on the channels of x, with R = I + B T B^T."""
        offset = None if bias is None else -(bias @ basis)
        if self.is_convolution:
            coordinates = functional.conv2d(x, basis.mT[..., None, None], offset)
            turned = functional.conv2d(coordinates, core[..., None, None])
            return x + functional.conv2d(turned, basis[..., None, None])
        rows = x.reshape(-1, x.shape[-1])
        coordinates = functional.linear(rows, basis.mT, offset)
        return torch.addmm(rows, functional.linear(coordinates, core), basis.mT).view(x.shape)

    def _scale(self, x: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        """m (x - b) + b on the channels of x, with m = 1 + gain."""
        if self.is_convolution:
            gain = gain[:, None, None]
            bias = None if bias is None else bias[:, None, None]
        return torch.addcmul(x, x if bias is None else x - bias, gain)

    def _factors(self, adapter: str, side: Side, dtype: torch.dtype) -> _Factors:
        """An adapter's factors; in evaluation they are kept until what they are made of changes."""
        # A compiled graph would take versions and addresses for constants.
        if self.training or torch.compiler.is_compiling():
            return self._make_factors(adapter, side, dtype)
        tensors = self._parameters_of(adapter)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self._make_factors(adapter, side, dtype)
        if any(t.is_inference() for t in tensors):  # inference tensors do not count their changes
            return self._make_factors(adapter, side, dtype)
        stamp = (
            dtype,
            optimizer_steps(),
            *(getattr(self, name).get(adapter) for name in self.other_param_names),
            *((t._version, t.data_ptr(), t.dtype, t.device) for t in tensors),
        )
        kept = self._kept.get((adapter, side))
        if kept is None or kept.stamp != stamp:
            # Outside inference mode, so that a later forward with gradients can use these tensors as well.
            with torch.inference_mode(False), torch.no_grad():
                factors = self._make_factors(adapter, side, dtype)
                kept = _Kept(stamp, factors, [t.detach() for t in tensors])
            self._kept[adapter, side] = kept
        return kept.factors

    def _make_factors(self, adapter: str, side: Side, dtype: torch.dtype) -> _Factors:
        rotation = self.given_rotations.get((adapter, side, dtype))
        if rotation is None and side in self.sides(adapter):
            basis, core = self.get_chain(adapter, side)
            rotation = basis.to(dtype), core.to(dtype)
        magnitude = self.get_magnitude(adapter, side)
        return _Factors(rotation, None if magnitude is None else (magnitude - 1).to(dtype))

    def _parameters_of(self, adapter: str) -> list[Tensor]:
        """The adapter's parameters, then its buffers."""
        containers = (getattr(self, name) for name in self.adapter_layer_names + self.buffer_names)
        return [container[adapter] for container in containers if adapter in container]

    def clear_chains(self) -> None:
        """Forget the kept factors; needed only after changes that leave no trace, see the class."""
        self._kept.clear()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; see peft's BaseTunerLayer."""
        self.clear_chains()
        super().delete_adapter(adapter_name)

    def train(self, mode: bool = True) -> RotatedLayer:
        """As in torch; training keeps no factors, and evaluation begins with new ones."""
        self.clear_chains()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> RotatedLayer:
        # Every move to a device or dtype comes through here.
        self.clear_chains()
        return super()._apply(fn, recurse)

    # The weight's path.

    def _adapt(self, weight: Tensor, adapter: str, scale: float, inverse: bool = False) -> Tensor:
        """W' from W, or W from W'."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            for side, dimension in zip(SIDES, (1, 0), strict=True):
                weight = self._adapt_side(weight.movedim(dimension, -1), adapter, side, scale, inverse)
                weight = weight.movedim(-1, dimension)
        return weight

    def _adapt_side(self, rows: Tensor, adapter: str, side: Side, scale: float, inverse: bool) -> Tensor:
        """R, then D, on rows of channels; or the inverse of D, then that of R."""
        magnitude = self.get_magnitude(adapter, side, scale)
        if magnitude is not None and inverse:
            rows = rows / magnitude
        if side in self.sides(adapter):
            basis, core = (t.to(rows) for t in self.get_chain(adapter, side, scale))
            core = rotations.inverse_core(basis, core) if inverse else core
            rows = rotations.apply(rows, basis, core if side == "output" else core.mT)
        return rows if magnitude is None or inverse else rows * magnitude

    def low_rank_delta(self, adapter: str) -> tuple[Tensor, Tensor]:
        """W' - W as the product up @ down, the form of a LoRA adapter (lora_B and lora_A).

        k is the sum of the widths w of the adapter's sides. A convolution's kernel goes into down, so that
        each direction of an input rotation counts kh * kw times there.

        Returns:
            up: (out, k), down: (k, in), or (out, k, 1, 1) and (k, in, kh, kw) for a convolution; float32 (or
            float64).

        Raises:
            UserError: the adapter has a magnitude, which changes W in every direction.
        """
        if any(self.get_magnitude(adapter, side) is not None for side in SIDES):
            raise UserError(
                f"The adapter {adapter!r} has learned magnitudes, which no low-rank change can express: merge it "
                "into the base model instead."
            )
        _, weight = self._float_weight()
        kernel = weight.shape[2:]
        ups: list[Tensor] = []
        downs: list[Tensor] = []
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            # R_out W R_in - W = (W B T) B^T + (B T) (B^T W R_in), of the input and the output side
            if "input" in self.sides(adapter):
                basis, core = (t.to(weight) for t in self.get_chain(adapter, "input"))
                moved = (weight.movedim(1, -1) @ (basis @ core)).movedim(-1, 1)  # (out, w, ...)
                ups.append(moved.flatten(1))
                taps = torch.eye(kernel.numel(), dtype=weight.dtype, device=weight.device)
                downs.append(torch.kron(basis.mT.contiguous(), taps))
                weight = weight + torch.einsum("ow...,iw->oi...", moved, basis)
            if "output" in self.sides(adapter):
                basis, core = (t.to(weight) for t in self.get_chain(adapter, "output"))
                ups.append(basis @ core)
                downs.append(basis.mT @ weight.flatten(1))
            up, down = torch.cat(ups, 1), torch.cat(downs, 0)
        return up.view(*up.shape, *(1 for _ in kernel)), down.view(len(down), *weight.shape[1:])


def _bias_of(base_layer: nn.Module) -> Tensor | None:
    """A layer's bias, also outside its forward pass, where offloading may have taken it away."""
    bias: Tensor | None = getattr(base_layer, "bias", None)
    if bias is None or not bias.is_meta:
        return bias
    # enable_sequential_cpu_offload: accelerate's hook keeps the values
    hook: Any = base_layer._hf_hook
    (values,) = (h.weights_map for h in getattr(hook, "hooks", [hook]) if getattr(h, "weights_map", None))
    return values["bias"]
