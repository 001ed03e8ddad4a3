"""Layers whose inputs are rotated within a frozen subspace."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from loco_diffusion.adapters.loft.config import LOFTConfig
from loco_diffusion.adapters.loft.supports import (
    GRADIENT_SUPPORTS,
    WEIGHT_SUPPORTS,
    Support,
    fit_support,
    gradient_needed,
)
from loco_diffusion.adapters.rotated import RotatedLayer, Side
from loco_diffusion.errors import UserError


class LOFTLayer(RotatedLayer):
    """A LOFT layer: W' = W (I + P (R - I) P^T).

    Attributes, each a dict keyed by the adapter's name:
        loft_skew: parameters, (r (r - 1) / 2,), what is above the diagonal of the skew matrix that R is the
            Cayley transform of.
        loft_matrix: parameters, (r, r), R itself where the adapter is free.
        loft_basis: P, (in_features, r), a buffer that is saved with the parameters.
        r, support: from the config.
        fitted: whether loft_basis holds a support; one from gradients waits for :meth:`fit`, or to be loaded.
        scaling: strength, the factor on the skew matrix; of a free R it is the factor on R - I.
    """

    adapter_layer_names = ("loft_skew", "loft_matrix")
    buffer_names = ("loft_basis",)
    other_param_names = ("r", "support", "fitted", "scaling")
    loft_skew: nn.ParameterDict
    loft_matrix: nn.ParameterDict
    loft_basis: BufferDict
    support: dict[str, Support]
    fitted: dict[str, bool]

    def update_layer(self, adapter_name: str, config: LOFTConfig) -> None:
        """Add the adapter ``adapter_name``, or replace it.

        Raises:
            UserError: r is more than the layer has inputs.
        """
        r = config.r
        if r > self.in_features:
            raise UserError(
                f"LOFT turns r directions, but r = {r} exceeds the {self.in_features} inputs of a target layer: "
                "lower r or leave that layer out of target_modules."
            )
        self._forget(adapter_name)
        self.configure(adapter_name, config)
        spread = 0.0 if config.init_weights else 0.1
        if config.free:
            parameter = nn.Parameter(torch.eye(r) + spread * torch.randn(r, r))
            self.loft_matrix[adapter_name] = parameter
        else:
            parameter = nn.Parameter(spread * torch.randn(r * (r - 1) // 2))
            self.loft_skew[adapter_name] = parameter
        self._start_basis(adapter_name)
        self._updated(adapter_name, config)

    def configure(self, adapter: str, config: LOFTConfig) -> None:
        """Take over the settings of a configuration that gives the parameters their present shapes."""
        self.r[adapter] = config.r
        self.support[adapter] = config.support
        self.scaling[adapter] = self.full_scale(adapter)

    def full_scale(self, adapter: str) -> float:
        """1: there is no alpha."""
        return 1.0

    def _start_basis(self, adapter: str) -> None:
        self.loft_basis[adapter] = torch.zeros(self.in_features, self.r[adapter])
        self.fitted[adapter] = not self.needs_gradient(adapter)
        # on the meta device, because the adapter is about to be loaded
        if not self.fitted[adapter] or self._parameter(adapter).is_meta:
            return
        try:
            self._set_basis(adapter)
        except UserError:  # a quantised weight; the adapter may still be loaded
            self.fitted[adapter] = False

    def _set_basis(self, adapter: str, gradient: Tensor | None = None) -> None:
        support = self.support[adapter]
        weight = self._float_weight()[1] if support in WEIGHT_SUPPORTS else None
        basis = fit_support(support, self.in_features, self.r[adapter], weight, gradient)
        # Contiguous as a loaded one is, so that both give equal bits.
        self.loft_basis[adapter] = basis.to(self._parameter(adapter).device).contiguous()

    def _parameter(self, adapter: str) -> Tensor:
        return (self.loft_matrix if adapter in self.loft_matrix else self.loft_skew)[adapter]

    def needs_gradient(self, adapter: str) -> bool:
        """Whether the adapter's support is "gradient" or "skew"."""
        return self.support[adapter] in GRADIENT_SUPPORTS

    def fit(self, adapter: str, gradient: Tensor) -> None:
        """Choose P for the gradient G of the loss with respect to the base weight; R stays what it is."""
        self._set_basis(adapter, gradient)
        self.fitted[adapter] = True

    def get_chain(
        self, adapter: str, side: Side = "input", scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """U = I + P (R - I) P^T, see :meth:`RotatedLayer.get_chain`.

        Returns:
            P: (in_features, r) and R - I: (r, r).

        Raises:
            UserError: the support is one from gradients that has not been fitted, or one from a quantised weight.
        """
        if not self.fitted[adapter]:
            raise self._not_fitted(adapter)
        scale = self.scaling[adapter] if scale is None else scale
        parameter = self._parameter(adapter)
        parameter = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
        with torch.autocast(parameter.device.type, enabled=False):
            free = adapter in self.loft_matrix
            core = _free_core(parameter, scale) if free else cayley_core(skew_matrix(scale * parameter))
        return self.loft_basis[adapter].to(core), core

    def _not_fitted(self, adapter: str) -> UserError:
        support = self.support[adapter]
        if self.needs_gradient(adapter):
            return gradient_needed(support)
        return UserError(
            f"The support {support!r} is chosen from the base weight, which a quantised layer does not show: load "
            "a saved adapter, choose another support, or load the base model without quantisation."
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.fitted:
            basis = state_dict.get(f"{prefix}loft_basis.{name}")
            if basis is not None:  # zeros, if it was saved before it was fitted
                self.fitted[name] = bool(basis.any())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "loft." + super().__repr__()


class Linear(LOFTLayer):
    """Any linear layer, quantised ones included; peft's "all-linear" knows it by this name."""


class Conv2d(LOFTLayer):
    """Any ungrouped 2-d convolution."""


def skew_matrix(entries: Tensor) -> Tensor:
    """The skew matrix A: (r, r) whose part above the diagonal is this, row by row: (r (r - 1) / 2,)."""
    size = math.isqrt(2 * len(entries)) + 1
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(size, size).index_put((rows, columns), entries)
    return upper - upper.mT


def cayley_core(skew: Tensor) -> Tensor:
    """R - I = (I - A/2)^-1 A for the Cayley transform R = (I - A/2)^-1 (I + A/2) of a skew A: (r, r)."""
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    # never singular; solve_ex does not look at the error code, hence does not wait for the device
    return torch.linalg.solve_ex(eye - skew / 2, skew).result


def _free_core(matrix: Tensor, scale: float) -> Tensor:
    """scale * (R - I)."""
    return scale * (matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
