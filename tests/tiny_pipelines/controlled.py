"""Tiny pipelines under control: what the tests of all families share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.adapters.loco.config import RotatedSide
from loco_diffusion.control import EncoderConfig, TokensConfig
from loco_diffusion.control.adapter import Route
from tiny_pipelines import Tiny

ROUTES: tuple[Route, ...] = ("encoder", "tokens")
_built: dict[str, Any] = {}


def fresh(tiny: Tiny) -> Any:
    """A pipeline that the test may change."""
    if tiny.name not in _built:
        _built[tiny.name] = tiny.build()
        _built[tiny.name].set_progress_bar_config(disable=True)
    return copy.deepcopy(_built[tiny.name])


def add(
    controller: Controller,
    route: Route,
    name: str = "canny",
    seed: int = 0,
    stride: int = 1,
    side: RotatedSide = "both",
) -> None:
    """An adapter that looks trained: small random weights everywhere."""
    encoder = EncoderConfig(hidden_size=8) if route == "encoder" else None
    tokens = TokensConfig(stride) if route == "tokens" else None
    config = LoCOConfig(r=2, num_rotations=2, side=side)
    controller.add_adapter(name, config, encoder=encoder, tokens=tokens)
    randomise(controller, name, seed)


def randomise(controller: Controller, name: str, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameters in controller.trainable_parameters(name).values():
        for parameter in parameters:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def random_maps(seed: int, batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def maps(tiny: Tiny, batch: int = 1, seed: int = 0, scale: tuple[int, int] = (1, 1)) -> Tensor:
    """Condition maps of so many times the tiny pipeline's size."""
    return random_maps(seed, batch, tiny.side * scale[0], tiny.side * scale[1])
