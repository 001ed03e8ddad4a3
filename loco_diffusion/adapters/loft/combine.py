"""Several rotations in frozen subspaces as one, in the subspace that all of them span together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loco_diffusion.adapters.loft.layer import cayley_core, skew_matrix
from loco_diffusion.errors import UserError

Turn = tuple[Tensor, Tensor, float]
"""P: (n, r), what is above the diagonal of the skew matrix A: (r (r - 1) / 2,), and the factor on A."""

_NO_DIRECTION = 1e-6  # a singular value of bases side by side that is their rounding
_LEFT_TO_HALF_TURN = 0.02  # radians; closer to it A is so large that float32 loses the small angles beside it


def compose(turns: Sequence[Turn]) -> tuple[Tensor, Tensor]:
    """The product U_1 U_2 ... of the rotations U_i = I + P_i (R_i - I) P_i^T, R_i the Cayley transform of A_i.

    On the joint subspace it is a rotation R, the Cayley transform of A = 2 (R + I)^-1 (R - I).

    Args:
        turns: one or more of one space, in the order of the product.

    Returns:
        P: (n, r) and what is above A's diagonal, for a factor of 1, in float32, or float64 if a basis is.

    Raises:
        UserError: the product turns a plane by half a turn, as no Cayley transform does, or nearly so.
    """
    span, places = _joint_span(turns)
    eye = torch.eye(span.shape[1]).to(span)
    product = eye
    for place, (_, entries, scale) in zip(places, turns, strict=True):
        core = cayley_core(skew_matrix(scale * entries.double()))
        product = product @ (eye + place @ core @ place.mT)
    # The singular values of R + I are 2 cos(angle / 2), near half a turn what is left to it.
    if torch.linalg.svdvals(product + eye).amin() < _LEFT_TO_HALF_TURN:
        raise UserError(
            "The adapters together turn some inputs by half a turn or nearly so, which no single LOFT adapter "
            "can: lower their strengths, or choose lie."
        )
    return _rounded(turns, span, 2 * torch.linalg.solve(product + eye, product - eye))


def lie(turns: Sequence[Turn]) -> tuple[Tensor, Tensor]:
    """The rotation whose skew matrix is the sum of those of the turns, P_i A_i P_i^T.

    With factors that add up to 1 it is a mean of rotations. It does not depend on their order.

    Args:
        turns: one or more of one space.

    Returns:
        As :func:`compose`.
    """
    span, places = _joint_span(turns)
    skew = torch.zeros(span.shape[1], span.shape[1]).to(span)
    for place, (_, entries, scale) in zip(places, turns, strict=True):
        skew = skew + place @ skew_matrix(scale * entries.double()) @ place.mT
    return _rounded(turns, span, skew)


def _joint_span(turns: Sequence[Turn]) -> tuple[Tensor, list[Tensor]]:
    """Q: (n, q), an orthonormal basis of what the P_i span together, and each Q^T P_i: (q, r_i); in float64."""
    bases = [basis.double() for basis, _, _ in turns]
    left, values, _ = torch.linalg.svd(torch.cat(bases, 1), full_matrices=False)
    span = left[:, values > _NO_DIRECTION]  # adapters of one base model often have one support
    return span, [span.mT @ basis for basis in bases]


def _rounded(turns: Sequence[Turn], span: Tensor, skew: Tensor) -> tuple[Tensor, Tensor]:
    """Q and what is above A's diagonal in the dtype of a layer."""
    dtype = torch.promote_types(turns[0][0].dtype, torch.float32)
    rows, columns = torch.triu_indices(len(skew), len(skew), 1, device=skew.device)
    return span.to(dtype), skew[rows, columns].to(dtype)
