"""Adapters that look trained."""

from __future__ import annotations

import torch

from loco_diffusion import Controller


def randomise(controller: Controller, name: str, seed: int = 0) -> None:
    """Small random weights everywhere."""
    generator = torch.Generator().manual_seed(seed)
    for parameters in controller.trainable_parameters(name).values():
        for parameter in parameters:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
