"""The adapters that are compared, each with about as many trainable parameters as a LoRA of a given rank."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import (
    BOFTConfig,
    HRAConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PsoftConfig,
    RoadConfig,
    inject_adapter_in_model,
)
from torch import nn

from loco_diffusion.adapters import LoCAConfig, LocationSchedule, LoCOConfig, LOFTConfig

BARE, REFERENCE = "bare", "LoRA"
Targets = str | list[str]

# For layers of `width` inputs and outputs, where a LoRA of rank `rank` has 2 * rank * width parameters. RoAd has
# no size to choose and always has far fewer, as has LOFT with its default r. BOFT gets a single butterfly factor:
# that is its fastest form, and all that peft has where its CUDA extension cannot be built.
METHODS: dict[str, Callable[[int, int], PeftConfig]] = {
    REFERENCE: lambda rank, width: LoraConfig(r=rank, lora_alpha=rank),
    "LoCO": lambda rank, width: LoCOConfig(r=4, num_rotations=rank // 4, side="input"),
    "LoCO, order 0": lambda rank, width: LoCOConfig(
        r=4, num_rotations=rank // 4, side="input", chain_order=0
    ),
    "LoCO, both sides": lambda rank, width: LoCOConfig(r=4, num_rotations=rank // 8, side="both"),
    "LOFT": lambda rank, width: LOFTConfig(r=_skew_size(2 * rank * width), support="random"),
    "LOFT, r = 64": lambda rank, width: LOFTConfig(r=64, support="random"),
    "LoCA": lambda rank, width: LoCAConfig(num_coefficients=2 * rank * width // 3),
    "DoRA": lambda rank, width: LoraConfig(r=rank, lora_alpha=rank, use_dora=True),
    "OFT": lambda rank, width: OFTConfig(oft_block_size=_divisor(width, 4 * rank + 1)),
    "BOFT": lambda rank, width: BOFTConfig(boft_block_size=_divisor(width, 2 * rank)),
    "HRA": lambda rank, width: HRAConfig(r=2 * rank),
    "PSOFT": lambda rank, width: PsoftConfig(r=_skew_size(2 * rank * width), psoft_svd="lowrank"),
    "RoAd": lambda rank, width: RoadConfig(variant="road_4", group_size=_divisor(width, 64)),
}


class Adapted(NamedTuple):
    """A model with an adapter, and how many parameters that has."""

    model: nn.Module
    parameters: int


def adapt(
    base: nn.Module, method: str, rank: int, width: int, targets: Targets, dtype: torch.dtype
) -> Adapted:
    """A model with the base's own weights, shared with it, and an adapter with parameters of this dtype.

    Args:
        base: the model.
        method: one of METHODS, or BARE for no adapter.
        rank, width: what the adapter's size is chosen by.
        targets: a value for ``target_modules``.
        dtype: of the adapter.
    """
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in base.parameters()}
    model = copy.deepcopy(base, memo=shared)
    if method == BARE:
        return Adapted(model, 0)
    config = METHODS[method](rank, width)
    config.target_modules = targets if isinstance(targets, str) else set(targets)
    inject_adapter_in_model(config, model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.data = parameter.data.to(dtype)
    if isinstance(config, LoCAConfig):
        LocationSchedule(model, total_steps=1, until=0)  # as in most of its training, locations rest
    return Adapted(model, sum(p.numel() for p in trainable))


def _skew_size(parameters: int) -> int:
    """The r for which r (r - 1) / 2 is closest to a number of parameters."""
    return round((1 + math.sqrt(1 + 8 * parameters)) / 2)


def _divisor(number: int, wanted: int) -> int:
    """The divisor of a number that is closest to the one that is wanted."""
    divisors = [i for i in range(1, number + 1) if number % i == 0]
    return min(divisors, key=lambda divisor: abs(divisor - wanted))
