"""Layers whose weight changes by a few cosine coefficients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loco_diffusion.adapters.adapted import AdaptedLayer
from loco_diffusion.adapters.loca import spectrum
from loco_diffusion.adapters.loca.config import LoCAConfig
from loco_diffusion.adapters.loca.spectrum import Entries
from loco_diffusion.errors import UserError


class LoCALayer(AdaptedLayer):
    """A LoCA layer: W' = W + scaling C_out^T S C_in, see :mod:`loco_diffusion.adapters.loca.spectrum`.

    Attributes, each a dict keyed by the adapter's name:
        loca_a: parameters, (n,), the coefficients, float32 unless cast.
        loca_l: parameters, (2, n), their rows and columns in 0..1; float32 at least.
        r: n, the number of coefficients.
        alpha: from the config.
        scaling: strength * alpha.
    """

    adapter_layer_names = ("loca_a", "loca_l")
    loca_a: nn.ParameterDict
    loca_l: nn.ParameterDict

    @property
    def grid(self) -> tuple[int, int]:
        """The shape of S: (out, in), or (out, in * kh * kw) for a convolution."""
        base = self.get_base_layer()
        taps = math.prod(base.kernel_size) if isinstance(base, nn.Conv2d) else 1
        return self.out_features, self.in_features * taps

    def update_layer(self, adapter_name: str, config: LoCAConfig) -> None:
        """Add the adapter ``adapter_name``, or replace it.

        Raises:
            UserError: there are more coefficients than the layer has weights.
        """
        cells = math.prod(self.grid)
        if config.num_coefficients > cells:
            raise UserError(
                f"LoCA cannot place num_coefficients = {config.num_coefficients} coefficients in a target layer "
                f"of {cells} weights: lower num_coefficients, or leave that layer out of target_modules."
            )
        self._forget(adapter_name)
        self.configure(adapter_name, config)
        a = (0.0 if config.init_weights else 0.1) * torch.randn(config.num_coefficients)
        self.loca_a[adapter_name] = nn.Parameter(a)
        self.loca_l[adapter_name] = nn.Parameter(torch.rand(2, config.num_coefficients))
        self._updated(adapter_name, config)

    def configure(self, adapter: str, config: LoCAConfig) -> None:
        """Take over the settings of a configuration that gives the parameters their present shapes."""
        self.r[adapter] = config.num_coefficients
        self.alpha[adapter] = config.alpha
        self.scaling[adapter] = self.full_scale(adapter)

    def full_scale(self, adapter: str) -> float:
        """alpha."""
        return self.alpha[adapter]

    def get_entries(self, adapter: str, scale: float) -> Entries:
        """The entries of scale * S, differentiable; float32, or float64 for float64 parameters."""
        a = self.loca_a[adapter]
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        sparse = spectrum.entries(a, self.loca_l[adapter], self.grid)
        return sparse._replace(values=sparse.values * scale)

    def _leave(self, y: Tensor, x: Tensor, adapters: list[str]) -> Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for adapter in adapters:
            y = y + self._change(x, adapter, self.scaling[adapter]).to(y.dtype)
        return y

    def _change(self, x: Tensor, adapter: str, scale: float) -> Tensor:
        """(W' - W) x."""
        raise NotImplementedError

    def _adapt(self, weight: Tensor, adapter: str, scale: float, inverse: bool = False) -> Tensor:
        return weight + self._dense(adapter, -scale if inverse else scale).to(weight)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """W' - W for the adapter at its present strength, of W's shape, in float32 (or float64)."""
        return self._dense(adapter, self.scaling[adapter])

    def _dense(self, adapter: str, scale: float) -> Tensor:
        with torch.no_grad():
            sparse = self.get_entries(adapter, scale)
            # A location that is not finite is rounded to some cell; its coefficient must not look sound.
            values = sparse.values + 0 * self.loca_l[adapter].sum(0).to(sparse.values)
            change = spectrum.dense(sparse._replace(values=values), self.grid)
        base = self.get_base_layer()
        return change.view(base.weight.shape) if isinstance(base, nn.Conv2d) else change

    def _apply(self, fn: Any, recurse: bool = True) -> LoCALayer:
        # Every cast comes through here. Half precision cannot tell the cells of a grid of thousands apart.
        exact = {name: location.detach() for name, location in self.loca_l.items()}
        super()._apply(fn, recurse)
        for name, location in self.loca_l.items():
            if location.dtype.itemsize < torch.float32.itemsize:
                location.data = exact[name].to(location.device)
        return self

    def __repr__(self) -> str:
        return "loca." + super().__repr__()


class Linear(LoCALayer):
    """Any linear layer, quantised ones included; peft's "all-linear" knows it by this name."""

    def _change(self, x: Tensor, adapter: str, scale: float) -> Tensor:
        return spectrum.apply(x, self.get_entries(adapter, scale), self.out_features)


class Conv2d(LoCALayer):
    """Any ungrouped 2-d convolution."""

    def _change(self, x: Tensor, adapter: str, scale: float) -> Tensor:
        # To transform activations, a convolution's would have to be unfolded to kh * kw times their size, while
        # the weight is small. So it is the weight's change that is transformed, again in the backward pass
        # instead of being kept.
        return checkpoint(self._convolve, x, adapter, scale, use_reentrant=False, preserve_rng_state=False)

    def _convolve(self, x: Tensor, adapter: str, scale: float) -> Tensor:
        convolution = self.get_base_layer()
        assert isinstance(convolution, nn.Conv2d)
        change = spectrum.dense(self.get_entries(adapter, scale), self.grid)
        return convolution._conv_forward(x, change.view(convolution.weight.shape).to(x.dtype), None)
