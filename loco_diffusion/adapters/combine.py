"""Several LoCO adapters as one: the product of their rotations, or the sum of their generators."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from loco_diffusion.adapters.loco.config import LoCOConfig
from loco_diffusion.adapters.patterns import rank_pattern
from loco_diffusion.errors import UserError
from loco_diffusion.rotations import resolve_order

Combination = Literal["compose", "lie"]
COMBINATIONS: tuple[Combination, ...] = ("compose", "lie")

Weights = Mapping[str, Tensor]
"""An adapter's parameters, named as in the base model: ``path.to.layer.loco_u``."""

Chain = tuple[Tensor, Tensor, float]
"""u, v: (m, n, r), and the factor on every angle, as `rotations.chain` takes them."""

_ROTATIONS, _PLANES = 0, 2  # dimensions of the factors


def compose(chains: Sequence[Chain]) -> tuple[Tensor, Tensor]:
    """The factors of the product R_1 R_2 ... of chains, exact for both rotation maps.

    The rotations stand one behind the other; those with fewer planes are filled up with zeros, which do not
    turn.

    Args:
        chains: one or more, in the order of the product.

    Returns:
        u, v: (sum of m, n, max of r) for a factor of 1, in float32, or float64 if a factor is float64.

    Raises:
        UserError: the chains turn spaces of different sizes, or together have more directions than theirs.
    """
    return _join(chains, _ROTATIONS, filled=_PLANES)


def lie(chains: Sequence[Chain]) -> tuple[Tensor, Tensor]:
    """The factors of the chain whose k-th generator is the sum of the chains' k-th generators.

    With weights that add up to 1 in the factors, it is the mean of rotations in their Lie algebra. It does
    not depend on the order, and is the product where the generators commute. Shorter chains are filled up
    with the identity.

    Args:
        chains: one or more.

    Returns:
        u, v: (max of m, n, sum of r) for a factor of 1, in float32, or float64 if a factor is float64.

    Raises:
        UserError: the chains turn spaces of different sizes, or together have more directions than theirs.
    """
    return _join(chains, _PLANES, filled=_ROTATIONS)


def _join(chains: Sequence[Chain], along: int, filled: int) -> tuple[Tensor, Tensor]:
    """Concatenate factors in one dimension, where they all have the greatest size in the other one."""
    sizes = sorted({u.shape[1] for u, _, _ in chains})
    if len(sizes) != 1:
        raise UserError(
            f"Rotations of {' and '.join(map(str, sizes))} dimensions cannot be merged into one: the adapters "
            "sit on layers of different shapes; merge adapters of the same base model."
        )
    size = max(u.shape[filled] for u, _, _ in chains)

    def fill(factor: Tensor) -> Tensor:
        factor = factor.to(torch.promote_types(factor.dtype, torch.float32))
        shape = list(factor.shape)
        shape[filled] = size - shape[filled]
        return torch.cat([factor, factor.new_zeros(shape)], filled)

    u = torch.cat([fill(u) for u, _, _ in chains], along)
    v = torch.cat([fill(v) * scale for _, v, scale in chains], along)
    directions = 2 * u.shape[_ROTATIONS] * u.shape[_PLANES]
    if directions > sizes[0]:
        raise UserError(
            f"The merged rotations have {directions} directions (2 * r * num_rotations), more than the "
            f"{sizes[0]} of the layer: merge fewer adapters at once or adapters of a lower rank."
        )
    return u, v


def chains_of(config: LoCOConfig, weights: Weights) -> dict[str, Chain]:
    """The chain of every layer and side of an adapter, at strength 1, by the name of its u."""
    chains: dict[str, Chain] = {}
    for name, u in weights.items():
        path, _, kind = name.rpartition(".")
        if kind in ("loco_u", "loco_u_out"):
            chains[name] = u, weights[_name_of_v(name)], _scale(config, path)
    return chains


def merge_adapters(
    adapters: Sequence[tuple[LoCOConfig, Weights]], how: Combination, strengths: Sequence[float]
) -> tuple[LoCOConfig, dict[str, Tensor]]:
    """One adapter that does what several do together.

    "compose" is exactly what the adapters do when they are active in this order, each at its strength: in every
    layer W R_a R_b on the input side, R_b R_a W on the output side. "lie" adds strength times generator, see
    :func:`lie`, and strength times the logarithms of the magnitudes.

    Args:
        adapters: configurations and parameters, one or more.
        how: "compose" or "lie".
        strengths: one for each adapter.

    Returns:
        A configuration whose ranks are the layers' and whose scale is 1, and its parameters.

    Raises:
        UserError: the adapters differ in layers, shapes, sides or rotation map, are not exact, have magnitudes
            that cannot be composed, or have more directions than a layer.
    """
    _check_alike(adapters, how)
    merge = compose if how == "compose" else lie
    config, first = adapters[0]
    merged: dict[str, Tensor] = {}
    all_chains = [chains_of(*adapter) for adapter in adapters]
    for name in all_chains[0]:
        parts = [
            (*chains[name][:2], chains[name][2] * strength)
            for chains, strength in zip(all_chains, strengths, strict=True)
        ]
        if name.endswith("_out"):  # outputs meet the first adapter first
            parts.reverse()
        merged[name], merged[_name_of_v(name)] = merge(parts)
    for name in sorted(first.keys() - merged.keys()):  # logarithms of magnitudes
        path = name.rpartition(".")[0]
        merged[name] = torch.stack(
            [w[name].float() * _scale(c, path) * s for (c, w), s in zip(adapters, strengths, strict=True)]
        ).sum(0)
    ranks = {name.rpartition(".")[0]: merged[name].shape[_PLANES] for name in all_chains[0]}
    rank, pattern = rank_pattern(ranks)
    return dataclasses.replace(
        config,
        r=rank,
        rank_pattern=pattern,
        num_rotations=merged[next(iter(all_chains[0]))].shape[_ROTATIONS],
        alpha=None,
        alpha_pattern={},
        chain_order="exact",
    ), merged


def _name_of_v(name_of_u: str) -> str:
    path, _, kind = name_of_u.rpartition(".")
    return f"{path}.{kind.replace('_u', '_v')}"


def _scale(config: LoCOConfig, path: str) -> float:
    config = config.for_layer(path)
    return 1.0 if config.alpha is None else config.alpha / config.r


def _check_alike(adapters: Sequence[tuple[LoCOConfig, Weights]], how: Combination) -> None:
    for config, weights in adapters:
        if config.modules_to_save or config.bias != "none":
            raise UserError(
                "Adapters that also train biases or whole modules (bias, modules_to_save) cannot be merged into "
                "one: merge each into the base model instead."
            )
        if resolve_order(config.chain_order, config.num_rotations) != config.num_rotations - 1:
            raise UserError(
                f"An adapter of chain_order {config.chain_order} is not a product of rotations and cannot be merged "
                'with others: train it with "exact".'
            )
        if how == "compose" and any(name.rpartition(".")[2].startswith("loco_m") for name in weights):
            raise UserError(
                "Adapters with learned magnitudes cannot be composed, because scales between rotations make no "
                "rotation: choose lie, or merge them into the base model one after the other."
            )
    config, weights = adapters[0]
    for other, other_weights in adapters[1:]:
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
        for name in sorted(weights.keys() ^ other_weights.keys()):
            raise UserError(
                f"The adapters do not sit on the same layers: only one of them has {name}; merge adapters that "
                "were trained with the same target_modules."
            )
