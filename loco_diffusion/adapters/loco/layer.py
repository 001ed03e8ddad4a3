"""Layers whose inputs, outputs or both are rotated by a chain of low-rank rotations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loco_diffusion import rotations
from loco_diffusion.adapters.loco.config import LoCOConfig, PlaneInit
from loco_diffusion.adapters.loft.supports import skew_planes
from loco_diffusion.adapters.rotated import SIDES, RotatedLayer, Side
from loco_diffusion.errors import UserError

# What a parameter's name ends with.
_SUFFIX: dict[Side, str] = {"input": "", "output": "_out"}


class LoCOLayer(RotatedLayer):
    """A LoCO layer: W' = D_out R_out W R_in D_in with the chains R and the magnitudes D.

    Attributes, each a dict keyed by the adapter's name; those ending in ``_out`` turn the output channels, the
    others the input channels; the n channels are in_features or out_features:
        loco_u, loco_v, loco_u_out, loco_v_out: parameters, (num_rotations, n, r), float32 unless cast.
        loco_k, loco_k_out: parameters of free adapters, (num_rotations, 2 * r, 2 * r), see `rotations.chain`.
        loco_m, loco_m_out: parameters, (n,), the logarithms of the magnitudes.
        r, alpha, num_rotations, chain_order, rotation_map, plane_init: from the config.
        scaling: strength * alpha / r, the factor on every angle and every logarithm.
    """

    adapter_layer_names = (
        "loco_u",
        "loco_v",
        "loco_u_out",
        "loco_v_out",
        "loco_k",
        "loco_k_out",
        "loco_m",
        "loco_m_out",
    )
    other_param_names = (
        "r",
        "alpha",
        "scaling",
        "num_rotations",
        "chain_order",
        "rotation_map",
        "plane_init",
    )
    num_rotations: dict[str, int]
    chain_order: dict[str, rotations.ChainOrder]
    rotation_map: dict[str, rotations.RotationMap]
    plane_init: dict[str, PlaneInit]

    def update_layer(self, adapter_name: str, config: LoCOConfig) -> None:
        """Add the adapter ``adapter_name``, or replace it.

        Raises:
            UserError: the rotations together have more directions than the layer has channels.
        """
        sides = [side for side in SIDES if config.side in (side, "both")]
        for side in sides:
            self._check_width(side, config)
        self._forget(adapter_name)
        self.configure(adapter_name, config)
        for side in sides:
            shape = (config.num_rotations, self.channels(side), config.r)
            u = nn.functional.normalize(torch.randn(shape), dim=1)
            v = torch.zeros(shape)
            if not config.init_weights:
                v = 0.1 * nn.functional.normalize(torch.randn(shape), dim=1)
            self._parameters_on(side, "u")[adapter_name] = nn.Parameter(u)
            self._parameters_on(side, "v")[adapter_name] = nn.Parameter(v)
            if config.free:
                k = rotations.plane_turns(config.num_rotations, config.r)
                if not config.init_weights:
                    k += 0.1 * torch.randn_like(k)
                self._parameters_on(side, "k")[adapter_name] = nn.Parameter(k)
        for side in SIDES if config.magnitude else ():
            m = (0.0 if config.init_weights else 0.1) * torch.randn(self.channels(side))
            self._parameters_on(side, "m")[adapter_name] = nn.Parameter(m)
        self._updated(adapter_name, config)

    def configure(self, adapter: str, config: LoCOConfig) -> None:
        """Take over the settings of a configuration that gives the parameters their present shapes."""
        self.r[adapter] = config.r
        self.alpha[adapter] = config.r if config.alpha is None else config.alpha
        self.num_rotations[adapter] = config.num_rotations
        self.chain_order[adapter] = config.chain_order
        self.rotation_map[adapter] = config.map
        self.plane_init[adapter] = config.init
        self.scaling[adapter] = self.full_scale(adapter)

    def _check_width(self, side: Side, config: LoCOConfig) -> None:
        width = 2 * config.r * config.num_rotations
        if width > self.channels(side):
            raise UserError(
                f"LoCO turns 2 * r * num_rotations directions, but {width} (r = {config.r}, num_rotations = "
                f"{config.num_rotations}) exceeds the {self.channels(side)} {side}s of a target layer: lower r "
                "or num_rotations, or leave that layer out of target_modules."
            )

    def _parameters_on(self, side: Side, kind: str) -> nn.ParameterDict:
        return getattr(self, f"loco_{kind}{_SUFFIX[side]}")

    def sides(self, adapter: str) -> tuple[Side, ...]:
        """Where the adapter rotates."""
        return tuple(side for side in SIDES if adapter in self._parameters_on(side, "u"))

    def planes(self, adapter: str, side: Side) -> tuple[Tensor, Tensor]:
        """U and V of a side, (num_rotations, n, r) each."""
        return self._parameters_on(side, "u")[adapter], self._parameters_on(side, "v")[adapter]

    def middle(self, adapter: str, side: Side) -> Tensor | None:
        """K of a side, (num_rotations, 2 * r, 2 * r); None if the adapter only turns."""
        return self._parameters_on(side, "k").get(adapter)

    def get_chain(
        self, adapter: str, side: Side = "input", scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """The chain R_1 ... R_m of a side as R = I + B T B^T, see :meth:`RotatedLayer.get_chain`.

        Returns:
            B: (n, 2 * r * num_rotations) and T, square.
        """
        return rotations.chain(
            *self.planes(adapter, side),
            self.scaling[adapter] if scale is None else scale,
            self.rotation_map[adapter],
            self.chain_order[adapter],
            self.middle(adapter, side),
        )

    def get_magnitude(self, adapter: str, side: Side, scale: float | None = None) -> Tensor | None:
        """exp(scale * loco_m), see :meth:`RotatedLayer.get_magnitude`."""
        logarithms = self._parameters_on(side, "m")
        if adapter not in logarithms:
            return None
        m = logarithms[adapter]
        m = m.to(torch.promote_types(m.dtype, torch.float32))
        return (m * (self.scaling[adapter] if scale is None else scale)).exp()

    def needs_gradient(self, adapter: str) -> bool:
        """Whether the config asks for planes from a gradient, init="skew"."""
        return self.plane_init[adapter] == "skew"

    def fit(self, adapter: str, gradient: Tensor) -> None:
        """Start the adapter at the identity, in the planes in which turning changes the loss fastest.

        To first order, turning by a generator A changes the loss by <S, A>, S the skew part of W^T G (of
        G W^T on the output side). The gradient of V = 0 is then in proportion to S U, and largest for U in the
        top singular space of S. That consists of planes, and a second vector of a plane would only repeat the
        generator of the first; so U takes one of each.

        Args:
            adapter: its name.
            gradient: G, of the loss with respect to the base weight, of its shape.
        """
        _, weight = self._float_weight()
        gradient = gradient.to(weight)
        with torch.no_grad():
            for side in self.sides(adapter):
                u, v = self.planes(adapter, side)
                pair = weight, gradient
                if side == "output":
                    pair = weight.transpose(0, 1), gradient.transpose(0, 1)
                num_rotations, _, r = u.shape
                vectors = skew_planes(*pair, 2 * r * num_rotations)[:, ::2]
                u.copy_(vectors.unflatten(1, (num_rotations, r)).transpose(0, 1))
                v.zero_()
                middle = self.middle(adapter, side)
                if middle is not None:
                    middle.copy_(rotations.plane_turns(num_rotations, r))
            for side in SIDES:
                if adapter in self._parameters_on(side, "m"):
                    self._parameters_on(side, "m")[adapter].zero_()

    def __repr__(self) -> str:
        return "loco." + super().__repr__()


class Linear(LoCOLayer):
    """Any linear layer, quantised ones included; peft's "all-linear" knows it by this name."""


class Conv2d(LoCOLayer):
    """Any ungrouped 2-d convolution."""
