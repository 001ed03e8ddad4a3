"""Several chains of rotations as one: their product, or the sum of their generators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loco_diffusion.errors import UserError

Chain = tuple[Tensor, Tensor, float]
"""u, v: (m, n, r), and the factor on every angle, as `rotations.chain` takes them."""

ROTATIONS, PLANES = 0, 2  # dimensions of the factors


def compose(chains: Sequence[Chain]) -> tuple[Tensor, Tensor]:
    """The factors of the product R_1 R_2 ... of chains, exact for both rotation maps.

    The rotations stand one behind the other; those with fewer planes are filled up with zeros, which do not
    turn.

    Args:
        chains: one or more of one space, in the order of the product.

    Returns:
        u, v: (sum of m, n, max of r) for a factor of 1, in float32, or float64 if a factor is float64.

    Raises:
        UserError: the chains together have more directions than their space.
    """
    return _join(chains, ROTATIONS, filled=PLANES)


def lie(chains: Sequence[Chain]) -> tuple[Tensor, Tensor]:
    """The factors of the chain whose k-th generator is the sum of the chains' k-th generators.

    With weights that add up to 1 in the factors, it is the mean of rotations in their Lie algebra. It does
    not depend on the order, and is the product where the generators commute. Shorter chains are filled up
    with the identity.

    Args:
        chains: one or more of one space.

    Returns:
        u, v: (max of m, n, sum of r) for a factor of 1, in float32, or float64 if a factor is float64.

    Raises:
        UserError: the chains together have more directions than their space.
    """
    return _join(chains, PLANES, filled=ROTATIONS)


def _join(chains: Sequence[Chain], along: int, filled: int) -> tuple[Tensor, Tensor]:
    """Concatenate factors in one dimension, where they all have the greatest size in the other one."""
    size = max(u.shape[filled] for u, _, _ in chains)

    def fill(factor: Tensor) -> Tensor:
        factor = factor.to(torch.promote_types(factor.dtype, torch.float32))
        shape = list(factor.shape)
        shape[filled] = size - shape[filled]
        return torch.cat([factor, factor.new_zeros(shape)], filled)

    u = torch.cat([fill(u) for u, _, _ in chains], along)
    v = torch.cat([fill(v) * scale for _, v, scale in chains], along)
    directions = 2 * u.shape[ROTATIONS] * u.shape[PLANES]
    if directions > u.shape[1]:
        raise UserError(
            f"The merged rotations have {directions} directions (2 * r * num_rotations), more than the "
            f"{u.shape[1]} of the layer: merge fewer adapters at once or adapters of a lower rank."
        )
    return u, v
