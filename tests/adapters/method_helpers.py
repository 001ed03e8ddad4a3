"""Every method on a small network: what the tests of all methods share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from loco_diffusion.adapters import LoCAConfig, LoCOConfig, LOFTConfig
from loco_diffusion.adapters.adapted import AdaptedLayer
from loco_diffusion.adapters.config import AdapterConfig

METHODS: dict[str, Callable[..., AdapterConfig]] = {
    "loco": lambda **settings: LoCOConfig(**{"r": 2, "num_rotations": 3, "side": "input", **settings}),
    "loco-output": lambda **settings: LoCOConfig(
        **{"r": 2, "num_rotations": 2, "side": "output", "map": "exp", **settings}
    ),
    "loco-both": lambda **settings: LoCOConfig(
        **{"r": 3, "num_rotations": 2, "side": "both", "magnitude": True, **settings}
    ),
    "loft": lambda **settings: LOFTConfig(**{"r": 12, **settings}),
    "loft-free": lambda **settings: LOFTConfig(**{"r": 5, "free": True, "support": "random", **settings}),
    "loca": lambda **settings: LoCAConfig(**{"num_coefficients": 90, **settings}),
}
TARGETS = {"linear": ["first", "second"], "conv2d": ["conv", "mix"]}


class Net(nn.Module):
    """Two convolutions, two linear layers, and a head that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 32, 3, stride=2, dilation=2, padding=2)
        self.mix = nn.Conv2d(32, 24, 1, bias=False)
        self.first = nn.Linear(24, 32)
        self.second = nn.Linear(32, 24, bias=False)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mix(torch.tanh(self.conv(x))).flatten(2).mT
        return self.head(self.second(torch.tanh(self.first(tokens))).mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def pictures(count: int = 4) -> Tensor:
    return torch.randn(count, 24, 6, 5, generator=torch.Generator().manual_seed(1))


class Case(NamedTuple):
    """A method on one kind of layer."""

    method: str
    kind: str

    def config(self, **settings: Any) -> AdapterConfig:
        defaults = {"target_modules": TARGETS[self.kind], "init_weights": False}
        return METHODS[self.method](**{**defaults, **settings})

    def model(self, **settings: Any) -> PeftModel:
        """An evaluated model with an adapter that changes it noticeably."""
        return get_peft_model(net(), self.config(**settings)).eval()

    def layer(self, **settings: Any) -> AdaptedLayer:
        """The model's first adapted layer."""
        return first_layer(self.model(**settings))

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Something for the layer to work on."""
        shape = (2, 7, 24) if self.kind == "linear" else (2, 24, 6, 5)
        generator = torch.Generator().manual_seed(1)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


CASES = [Case(method, kind) for method in METHODS for kind in TARGETS]


def first_layer(model: nn.Module) -> AdaptedLayer:
    return next(module for module in model.modules() if isinstance(module, AdaptedLayer))


def weaken(made: AdaptedLayer, adapter: str = "default") -> None:
    """Halve what the adapter has learned: what strength 0.5 must do, too."""
    with torch.no_grad():
        for name in ("loco_v", "loco_v_out", "loco_m", "loco_m_out", "loft_skew", "loca_a"):
            if adapter in getattr(made, name, ()):
                getattr(made, name)[adapter].mul_(0.5)
        for matrix in [made.loft_matrix[adapter]] if adapter in getattr(made, "loft_matrix", ()) else []:
            matrix.copy_((matrix + torch.eye(len(matrix))) / 2)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def adapter_names(model: nn.Module) -> set[str]:
    """The names of the parameters that belong to adapters."""
    return {
        name
        for name, _ in model.named_parameters()
        if name.split(".")[-2].startswith(("loco_", "loft_", "loca_"))
    }
