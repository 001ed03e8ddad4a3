"""The chains of all layers of a model in one computation, for training steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loco_diffusion import rotations
from loco_diffusion.adapters.loco.layer import LoCOLayer
from loco_diffusion.adapters.rotated import Side

_Place = tuple[LoCOLayer, str, Side]  # a layer, an adapter on it and one of its sides
_Kind = tuple[torch.Size, torch.device, bool, float, rotations.RotationMap, rotations.ChainOrder]


@contextmanager
def chains_together(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within the block, the active LoCO adapters in `model` take their chains from one computation of them all.

    A chain is some thirty small operations, and as many backwards, that take longer to start than to run: 155 against
    10 ms of a step of 1.4 s on the packaged base (108 layers, both sides, two threads of a CPU). The parameters must
    stay what they are until the block ends. The backward pass belongs into the block where layers are computed again
    in it (gradient checkpointing).

    Args:
        model: any model; only LoCO layers in training mode take part.
        dtype: of the activations that meet the rotations; before others, layers compute their own chains.
    """
    groups: dict[_Kind, list[_Place]] = defaultdict(list)
    for layer in model.modules():
        if isinstance(layer, LoCOLayer) and layer.training and not layer.disable_adapters:
            for adapter in layer.active_adapters:
                for side in layer.sides(adapter):
                    groups[_kind(layer, adapter, side)].append((layer, adapter, side))
    try:
        for kind, places in groups.items():
            _compute(kind, places, dtype)
        yield
    finally:
        for places in groups.values():
            for layer, _, _ in places:
                layer.given_rotations.clear()


def _kind(layer: LoCOLayer, adapter: str, side: Side) -> _Kind:
    u, _ = layer.planes(adapter, side)
    chain = layer.rotation_map[adapter], layer.chain_order[adapter]
    free = layer.middle(adapter, side) is not None
    return u.shape, u.device, free, layer.scaling[adapter], *chain


def _compute(kind: _Kind, places: list[_Place], dtype: torch.dtype) -> None:
    *_, scale, map, order = kind
    planes = [layer.planes(adapter, side) for layer, adapter, side in places]
    factors = [torch.stack(part) for part in zip(*planes, strict=True)]
    middles = [middle for place in places if (middle := place[0].middle(*place[1:])) is not None]
    if middles:
        factors.append(torch.stack(middles))

    def chain(u: Tensor, v: Tensor, middle: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return rotations.chain(u, v, scale, map, order, middle)

    found = (part.to(dtype).unbind() for part in torch.vmap(chain)(*factors))
    for (layer, adapter, side), rotation in zip(places, zip(*found, strict=True), strict=True):
        layer.given_rotations[adapter, side, dtype] = rotation
