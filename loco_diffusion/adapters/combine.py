"""Several adapters of one method as one: the product of their rotations, or the sum of their generators."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from peft import PeftConfig
from torch import Tensor

from loco_diffusion.adapters.config import AdapterConfig
from loco_diffusion.adapters.inspection import CHANNELS
from loco_diffusion.adapters.loco import combine as chains
from loco_diffusion.adapters.loco.config import LoCOConfig
from loco_diffusion.adapters.loft import combine as turns
from loco_diffusion.adapters.loft.config import LOFTConfig
from loco_diffusion.adapters.loft.supports import gradient_needed
from loco_diffusion.adapters.patterns import rank_pattern
from loco_diffusion.errors import UserError
from loco_diffusion.rotations import resolve_order

Combination = Literal["compose", "lie"]
COMBINATIONS: tuple[Combination, ...] = ("compose", "lie")

Weights = Mapping[str, Tensor]
"""An adapter's parameters, named as in the base model: ``path.to.layer.loco_u``."""

Merged = tuple[AdapterConfig, dict[str, Tensor]]


def merge_adapters(
    adapters: Sequence[tuple[PeftConfig, Weights]], how: Combination, strengths: Sequence[float]
) -> Merged:
    """One adapter that does what several LoCO, or several LOFT adapters do together.

    "compose" is exactly what the adapters do when they are active in this order, each at its strength: in every
    layer W R_a R_b on the input side, R_b R_a W on the output side. "lie" adds strength times generator, see
    `loco.combine.lie` and `loft.combine.lie`, and strength times the logarithms of the magnitudes.

    Args:
        adapters: configurations and parameters, one or more.
        how: "compose" or "lie".
        strengths: one for each adapter.

    Returns:
        A configuration whose ranks are the layers' and whose scale is 1, and its parameters.

    Raises:
        UserError: the adapters are of another method or of several, differ in layers, shapes, sides or rotation
            map, are free or no exact rotations, have magnitudes that cannot be composed, have more directions than a
            layer (LoCO), or together make half a turn (LOFT).
    """
    methods = {type(config) for config, _ in adapters}
    if len(methods) > 1 or not methods <= _MERGE.keys():
        names = " and ".join(sorted(method.__name__.removesuffix("Config") for method in methods))
        raise UserError(
            f"Only adapters that are all LoCO or all LOFT can be merged into one, but these are {names}: load them "
            "together instead, or fuse each into the base model."
        )
    return _MERGE[methods.pop()](adapters, how, strengths)


def _merge_loco(
    adapters: Sequence[tuple[LoCOConfig, Weights]], how: Combination, strengths: Sequence[float]
) -> Merged:
    _check_loco(adapters, how)
    _check_layers(adapters)
    merge = chains.compose if how == "compose" else chains.lie
    config, first = adapters[0]
    merged: dict[str, Tensor] = {}
    names = [name for name in first if name.endswith((".loco_u", ".loco_u_out"))]
    for name in names:
        parts = [
            (weights[name], weights[_name_of_v(name)], _scale(config, name) * strength)
            for (config, weights), strength in zip(adapters, strengths, strict=True)
        ]
        if name.endswith("_out"):  # outputs meet the first adapter first
            parts.reverse()
        merged[name], merged[_name_of_v(name)] = merge(parts)
    for name in sorted(first.keys() - merged.keys()):  # logarithms of magnitudes
        merged[name] = torch.stack(
            [w[name].float() * _scale(c, name) * s for (c, w), s in zip(adapters, strengths, strict=True)]
        ).sum(0)
    rank, pattern = rank_pattern({_path(name): merged[name].shape[chains.PLANES] for name in names})
    return dataclasses.replace(
        config,
        r=rank,
        rank_pattern=pattern,
        num_rotations=merged[names[0]].shape[chains.ROTATIONS],
        alpha=None,
        alpha_pattern={},
        chain_order="exact",
    ), merged


def _merge_loft(
    adapters: Sequence[tuple[LOFTConfig, Weights]], how: Combination, strengths: Sequence[float]
) -> Merged:
    if any(config.free for config, _ in adapters):
        raise UserError(
            "Free LOFT adapters hold any matrix instead of a rotation, hence no generator to compose or to add: "
            "merge each into the base model instead."
        )
    _check_layers(adapters)
    merge = turns.compose if how == "compose" else turns.lie
    merged: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path in sorted({_path(name) for name in adapters[0][1]}):
        basis_name, skew_name = f"{path}.loft_basis", f"{path}.loft_skew"
        parts = [(w[basis_name], w[skew_name], s) for (_, w), s in zip(adapters, strengths, strict=True)]
        for (config, _), (basis, _, _) in zip(adapters, parts, strict=True):
            if not basis.any():
                raise gradient_needed(config.support)
        merged[basis_name], merged[skew_name] = merge(parts)
        ranks[path] = merged[basis_name].shape[1]
    rank, pattern = rank_pattern(ranks)
    # The merged basis is none of the supports. For this one nothing is computed before a basis is loaded.
    config = dataclasses.replace(adapters[0][0], r=rank, rank_pattern=pattern, support="gradient")
    return config, merged


_MERGE: dict[
    type[PeftConfig],
    Callable[[Sequence[tuple[Any, Weights]], Combination, Sequence[float]], Merged],
] = {LoCOConfig: _merge_loco, LOFTConfig: _merge_loft}


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _name_of_v(name_of_u: str) -> str:
    path, _, kind = name_of_u.rpartition(".")
    return f"{path}.{kind.replace('_u', '_v')}"


def _scale(config: LoCOConfig, name: str) -> float:
    config = config.for_layer(_path(name))
    return 1.0 if config.alpha is None else config.alpha / config.r


def _check_loco(adapters: Sequence[tuple[LoCOConfig, Weights]], how: Combination) -> None:
    for config, weights in adapters:
        if resolve_order(config.chain_order, config.num_rotations) != config.num_rotations - 1:
            raise UserError(
                f"An adapter of chain_order {config.chain_order} is not a product of rotations and cannot be merged "
                'with others: train it with "exact".'
            )
        if config.free:
            raise UserError(
                "Free LoCO adapters do more than rotate, hence have no rotations to compose or to add: merge each "
                "into the base model instead."
            )
        if how == "compose" and any(name.rpartition(".")[2].startswith("loco_m") for name in weights):
            raise UserError(
                "Adapters with learned magnitudes cannot be composed, because scales between rotations make no "
                "rotation: choose lie, or merge them into the base model one after the other."
            )
    config = adapters[0][0]
    for other, _ in adapters[1:]:
        if other.map != config.map:
            raise UserError(
                f"The adapters' rotation maps differ ({config.map} and {other.map}), and one adapter has one map: "
                "merge adapters that were trained with the same."
            )
        if other.side != config.side:
            raise UserError(
                f"The adapters rotate different sides of the layers ({config.side} and {other.side}): merge "
                "adapters that were trained with the same side."
            )


def _check_layers(adapters: Sequence[tuple[AdapterConfig, Weights]]) -> None:
    """Raise UserError unless the adapters train nothing but the same layers, of the same shapes."""
    if any(config.modules_to_save or config.bias != "none" for config, _ in adapters):
        raise UserError(
            "Adapters that also train biases or whole modules (bias, modules_to_save) cannot be merged into one: "
            "merge each into the base model instead."
        )
    first = adapters[0][1]
    for _, weights in adapters[1:]:
        for name in sorted(weights.keys() ^ first.keys()):
            raise UserError(
                f"The adapters do not sit on the same layers: only one of them has {name}; merge adapters that "
                "were trained with the same target_modules."
            )
    for path, _, kind in (name.rpartition(".") for name in first):
        if kind not in CHANNELS:
            continue
        side, dimension = CHANNELS[kind]
        sizes = [weights[f"{path}.{kind}"].shape[dimension] for _, weights in adapters]
        if len(set(sizes)) > 1:
            raise UserError(
                f"The adapters sit on layers of different shapes: in their order, {path} has "
                f"{', '.join(map(str, sizes))} {side}s; merge adapters of the same base model."
            )
