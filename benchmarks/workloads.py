"""What adapters are timed on: a single layer, and blocks of FLUX.1, with random bfloat16 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from methods import Targets
from torch import Tensor, nn

from loco_diffusion.adapters import default_target_modules


class Workload(NamedTuple):
    """A frozen model, its layers to adapt, and its call; the inputs require gradients, as inside a network."""

    base: nn.Module
    targets: Targets
    run: Callable[[nn.Module], Tensor]


def linear(width: int, tokens: int, text_tokens: int, device: str) -> Workload:
    """One linear layer of width x width on image tokens."""
    base = nn.Sequential(nn.Linear(width, width, device=device, dtype=torch.bfloat16)).requires_grad_(False)
    x = _random(device, 1, tokens, width)
    return Workload(base, ["0"], lambda model: model(x))


def flux_blocks(width: int, tokens: int, text_tokens: int, device: str) -> Workload:
    """A double and a single block of FLUX.1 (its width is 3072) with their embeddings, attention adapted."""
    with torch.device(device):
        base = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=width // 128)
    base = base.to(torch.bfloat16).requires_grad_(False)
    inputs: dict[str, Any] = {
        "hidden_states": _random(device, 1, tokens, base.config.in_channels),
        "encoder_hidden_states": _random(device, 1, text_tokens, base.config.joint_attention_dim),
        "pooled_projections": _random(device, 1, base.config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], device=device, dtype=torch.bfloat16),
        "img_ids": torch.zeros(tokens, 3, device=device),
        "txt_ids": torch.zeros(text_tokens, 3, device=device),
    }
    targets = default_target_modules("FluxTransformer2DModel")
    assert targets is not None
    return Workload(base, targets, lambda model: model(**inputs, return_dict=False)[0])


WORKLOADS: dict[str, Callable[[int, int, int, str], Workload]] = {
    "linear": linear,
    "flux_blocks": flux_blocks,
}


def _random(device: str, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
