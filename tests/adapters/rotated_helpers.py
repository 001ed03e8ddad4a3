"""Rotated layers, with LoCO's rotations, and what they should do as dense float64 matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from loco_diffusion import LoCOConfig
from loco_diffusion.adapters.loco.layer import Conv2d, Linear, LoCOLayer
from loco_diffusion.adapters.rotated import SIDES, Side

IN, OUT = 32, 24

BASES: dict[str, Callable[..., nn.Module]] = {
    "linear": partial(nn.Linear, IN, OUT),
    "linear without bias": partial(nn.Linear, IN, OUT, bias=False),
    "conv2d": partial(nn.Conv2d, IN, OUT, (3, 2), stride=2, dilation=2, padding=(2, 1)),
    "conv2d without bias": partial(
        nn.Conv2d, IN, OUT, (1, 3), padding="same", padding_mode="circular", bias=False
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "input": {},
    "output": {"side": "output", "map": "exp"},
    "both": {"side": "both", "chain_order": 1},
    "magnitude": {"magnitude": True},
    "both and magnitude": {"side": "both", "magnitude": True},
    "free": {"free": True},
    "both and free": {"side": "both", "free": True, "map": "exp"},
}


def config(**changes: Any) -> LoCOConfig:
    settings = {"r": 2, "num_rotations": 3, "side": "input", "init_weights": False}
    return LoCOConfig(**{**settings, **changes})


def layer(kind: str = "linear", dtype: torch.dtype = torch.float64, **changes: Any) -> LoCOLayer:
    """An evaluated, frozen layer with an adapter that turns noticeably."""
    torch.manual_seed(0)
    base = BASES[kind](dtype=dtype)
    layer_cls = Conv2d if isinstance(base, nn.Conv2d) else Linear
    made = layer_cls(base, "default", config(**changes)).eval().requires_grad_(False)
    for v in (*made.loco_v.values(), *made.loco_v_out.values()):
        v.mul_(8)
    return made


def inputs(made: LoCOLayer, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (2, IN, 5, 6) if made.is_convolution else (2, 5, IN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def base(made: LoCOLayer, x: Tensor) -> Tensor:
    return made.get_base_layer()(x)


def dense_rotation(made: LoCOLayer, side: Side, adapter: str = "default") -> Tensor:
    """A side's rotation as a float64 matrix: from the definition if the chain is exact."""
    if side not in made.sides(adapter):
        return torch.eye(made.channels(side), dtype=torch.float64)
    if made.chain_order[adapter] != "exact":
        basis, core = (t.double() for t in made.get_chain(adapter, side))
        return torch.eye(len(basis)) + basis @ core @ basis.T
    rotation = eye = torch.eye(made.channels(side), dtype=torch.float64)
    u, v = (made._parameters_on(side, kind)[adapter].double() for kind in "uv")
    planes = torch.cat([u, v], dim=2)
    half = torch.eye(u.shape[2], dtype=torch.float64)
    turn = torch.kron(torch.tensor([[0, 1], [-1, 0]], dtype=torch.float64), half)
    middles = made._parameters_on(side, "k").get(adapter, turn.expand(len(u), -1, -1))
    for p, k in zip(planes, middles.double(), strict=True):
        generator = made.scaling[adapter] * (p @ k @ p.T)
        if made.rotation_map[adapter] == "exp":
            rotation = rotation @ torch.matrix_exp(generator)
        else:
            rotation = rotation @ torch.linalg.inv(eye - generator / 2) @ (eye + generator / 2)
    return rotation


def dense_weight(made: LoCOLayer, adapter: str = "default", weight: Tensor | None = None) -> Tensor:
    """D_out R_out W R_in D_in in float64, from the definition."""
    weight = made.get_base_layer().weight if weight is None else weight
    for side in SIDES:
        logarithms = made._parameters_on(side, "m").get(adapter, torch.zeros(()))
        rotation = dense_rotation(made, side, adapter)
        magnitude = (made.scaling[adapter] * logarithms.double()).exp()
        indices = "oi...,ip->op..." if side == "input" else "oi...,po->pi..."
        scaled = rotation * (magnitude if side == "input" else magnitude[..., None])
        weight = torch.einsum(indices, weight.double(), scaled)
    return weight


def with_weight(made: LoCOLayer, weight: Tensor, x: Tensor) -> Tensor:
    return functional_call(made.get_base_layer(), {"weight": weight}, (x,))
