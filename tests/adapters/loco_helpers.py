"""A small network with LoCO adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loco_diffusion import LoCOConfig
from loco_diffusion.adapters import LoCOLayer

IN, OUT = 32, 24


class Net(nn.Module):
    """Two layers that the adapters sit on, and one that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, OUT)
        self.second = nn.Linear(OUT, IN, bias=False)
        self.head = nn.Linear(IN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def config(**changes: Any) -> LoCOConfig:
    settings = {"r": 2, "num_rotations": 3, "side": "input", "target_modules": ["first", "second"]}
    return LoCOConfig(**{**settings, "init_weights": False, **changes})


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoCOLayer)}
