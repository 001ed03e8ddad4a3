"""Low-rank rotations and chains of them, as pure functions on tensors.

The mathematics of LoCO ("LoCO: Low-rank Compositional Rotation Fine-tuning", arXiv 2605.15916; the formulas
are this project's own derivation). A chain of ``m`` rotations of an ``n``-dimensional space, each of rank
``2r``, is held as

    R = R_1 R_2 ... R_m = I + B T B^T        B, the basis: (n, 2rm)        T, the core: (2rm, 2rm)

and no function here but the explicit references (:func:`skew`, :func:`dense`) ever forms an (n, n) matrix.
Everything is differentiable, batched over the rotations and free of host synchronisation, except for the
measurements, whose docstrings say that they return Python numbers. Small matrices are computed in float32 at
least (float64 in gives float64), also under autocast.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from loco_diffusion.errors import UserError

RotationMap = Literal["cayley", "exp"]
ROTATION_MAPS: tuple[RotationMap, ...] = ("cayley", "exp")
ChainOrder = int | Literal["exact"]

# exp: the Taylor series takes matrices scaled to a 1-norm of at most 1, by at most this many halvings.
_MAX_DOUBLINGS = 12


def chain(
    u: Tensor,
    v: Tensor,
    scale: float,
    map: RotationMap = "cayley",
    order: ChainOrder = "exact",
    middle: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The low-rank form (B, T) of the chain R_1 ... R_m with generators A_k = scale (U_k V_k^T - V_k U_k^T).

    Args:
        u, v: (m, n, r), the factors of the m generators.
        scale: turns every angle; a negative scale inverts each rotation, 0 gives the identity.
        map: "cayley", R = (I - A/2)^-1 (I + A/2), or "exp", the matrix exponential. "cayley" needs one small
            solve; "exp" needs a few dozen small products, and turns by the angle a, not by 2 atan(a / 2).
        order: see :func:`chain_core`.
        middle: (m, 2r, 2r), the K_k of generators A_k = scale [U_k V_k] K_k [U_k V_k]^T. None stands for
            :func:`plane_turns`; others that are not skew shear and stretch. With them "cayley" has no value where
            A_k has the eigenvalue 2.

    Returns:
        B: (n, 2rm) and T: (2rm, 2rm), in float32, or float64 if u is float64.

    Raises:
        UserError: unknown map, or order out of range.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    num_rotations = u.shape[0]
    with torch.autocast(u.device.type, enabled=False):
        b = basis(u.to(dtype), v.to(dtype))
        gram = b.mT @ b
        middle = None if middle is None else middle.to(dtype)
        if map == "cayley" and resolve_order(order, num_rotations) == num_rotations - 1:
            return b, cayley_chain_core(gram, num_rotations, scale, middle)
        cores = rotation_cores(_diagonal_blocks(gram, num_rotations), scale, map, middle)
        return b, chain_core(cores, gram, order)


def basis(u: Tensor, v: Tensor) -> Tensor:
    """B = [U_1 V_1 | U_2 V_2 | ...]: (n, 2rm) from u, v: (m, n, r)."""
    planes = torch.cat([u, v], dim=-1)
    return planes.transpose(0, 1).flatten(1)


def plane_turns(num_rotations: int, r: int) -> Tensor:
    """J = [[0, I], [-I, 0]] for each rotation: (num_rotations, 2r, 2r). With it P J P^T = U V^T - V U^T."""
    eye = torch.eye(2 * r)
    return _left(None, eye).repeat(num_rotations, 1, 1)


def rotation_cores(grams: Tensor, scale: float, map: RotationMap, middle: Tensor | None = None) -> Tensor:
    """The cores S_k of single rotations R_k = I + P_k S_k P_k^T, with P_k = [U_k V_k].

    Args:
        grams: (..., 2r, 2r), the Gram matrices P_k^T P_k.
        scale: turns every angle.
        map: "cayley" or "exp".
        middle: (..., 2r, 2r), see :func:`chain`.

    Returns:
        (..., 2r, 2r).

    Raises:
        UserError: unknown map.
    """
    if map == "cayley":
        return _cayley_cores(grams, scale, middle)
    if map == "exp":
        return _exp_cores(grams, scale, middle)
    raise UserError(f"Unknown rotation map {map!r}: choose one of {', '.join(ROTATION_MAPS)}.")


def chain_core(cores: Tensor, gram: Tensor, order: ChainOrder = "exact") -> Tensor:
    """The core T of R_1 ... R_m = I + B T B^T: T_p = sum over j = 0..p of (D N)^j D.

    D is the block diagonal of the single cores, N the strictly block-upper part of the Gram matrix. D N is
    nilpotent, so that p = m - 1 is exact ("exact"); p = 0 adds the rotations up without any product between
    them. For p < m - 1 the result is orthogonal only up to :func:`chain_error_bound`.

    Args:
        cores: (m, 2r, 2r), from :func:`rotation_cores`.
        gram: (2rm, 2rm), B^T B.
        order: "exact", or p in 0..m-1.

    Returns:
        (2rm, 2rm).

    Raises:
        UserError: order out of range.
    """
    num_rotations, width, _ = cores.shape
    order = resolve_order(order, num_rotations)
    eye = torch.eye(num_rotations, dtype=cores.dtype, device=cores.device)
    diagonal = (eye[:, None, :, None] * cores[:, :, None, :]).reshape(gram.shape)
    if order == 0:
        return diagonal
    later = torch.ones_like(eye).triu(1)[:, None, :, None]
    blocks = gram.view(num_rotations, width, num_rotations, width)
    step = diagonal @ (blocks * later).view(gram.shape)
    core = diagonal
    for _ in range(order):
        core = torch.addmm(diagonal, step, core)
    return core


def cayley_chain_core(gram: Tensor, num_rotations: int, scale: float, middle: Tensor | None = None) -> Tensor:
    """The exact core of a chain of Cayley rotations in one solve, T = s (I - s K H)^-1 K.

    K is the block diagonal of the middles, H the strictly block-upper part of the Gram matrix plus half of its
    diagonal blocks. It is what :func:`chain_core` gives for the cores of :func:`rotation_cores`, (D^-1 - N)^-1
    with D^-1 = K^-1 / s - diag(G) / 2, in a few steps instead of some for each product.

    Args:
        gram: (2rm, 2rm), B^T B.
        num_rotations: m.
        scale: s, turns every angle.
        middle: (m, 2r, 2r), see :func:`chain`.

    Returns:
        (2rm, 2rm).
    """
    ones = gram.new_ones(num_rotations, num_rotations)
    share = (ones.triu() + ones.triu(1)) / 2
    blocks = gram.view(num_rotations, -1, num_rotations, gram.shape[0] // num_rotations)
    rows = (blocks * share[:, None, :, None]).view(num_rotations, -1, gram.shape[0])
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    left = eye - scale * _left(middle, rows).view(gram.shape)
    right = scale * _left(middle, eye.view(rows.shape)).view(gram.shape)
    return torch.linalg.solve_ex(left, right).result


def resolve_order(order: ChainOrder, num_rotations: int) -> int:
    """The number of products that a chain order stands for: "exact" is num_rotations - 1.

    Raises:
        UserError: order is neither "exact" nor an int in 0..num_rotations-1.
    """
    if order == "exact":
        return num_rotations - 1
    if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order < num_rotations:
        raise UserError(
            f'chain_order must be "exact" or a whole number from 0 to {num_rotations - 1} '
            f"(num_rotations - 1), got {order!r}."
        )
    return order


def apply(x: Tensor, basis: Tensor, core: Tensor) -> Tensor:
    """Rotate row vectors: x R^T = x + ((x B) T^T) B^T, that is each row x_i becomes R x_i.

    ``apply(weight, basis, core.mT)`` is W R for a weight whose rows live in the rotated space.

    Args:
        x: (..., n).
        basis: (n, w) and core: (w, w), of the same dtype as x.

    Returns:
        (..., n), in x's dtype.
    """
    rows = x.reshape(-1, x.shape[-1])
    return torch.addmm(rows, rows @ basis @ core.mT, basis.mT).view(x.shape)


def inverse_core(basis: Tensor, core: Tensor) -> Tensor:
    """The core T' of the inverse, (I + B T B^T)^-1 = I + B T' B^T (Woodbury).

    For an orthogonal chain this is T^T; it also inverts truncated chains, which are only nearly orthogonal.

    Args:
        basis: (n, w), core: (w, w).

    Returns:
        (w, w).
    """
    eye = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)
    return torch.linalg.solve_ex(eye + core @ (basis.mT @ basis), -core).result


def skew(u: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """The generators as matrices, A = scale (U V^T - V U^T): (..., n, n) from u, v: (..., n, r)."""
    outer = u @ v.mT
    return scale * (outer - outer.mT)


def dense(basis: Tensor, core: Tensor) -> Tensor:
    """R = I + B T B^T as a matrix: (n, n) from basis (n, w) and core (w, w). A reference, for small n."""
    eye = torch.eye(basis.shape[0], dtype=basis.dtype, device=basis.device)
    return eye + basis @ core @ basis.mT


def orthogonality_error(basis: Tensor, core: Tensor) -> float:
    """The Frobenius norm of R R^T - I for R = I + B T B^T, without forming R.

    Args:
        basis: (n, w), core: (w, w).

    Returns:
        A Python float, 0 for an orthogonal R.
    """
    # R R^T - I = B M B^T; with B = Q C (QR) its norm is that of C M C^T. That avoids the squares, hence the
    # lost digits, of a formula in the Gram matrix.
    middle = core + core.mT + core @ (basis.mT @ basis) @ core.mT
    triangle = torch.linalg.qr(basis).R
    return torch.linalg.matrix_norm(triangle @ middle @ triangle.mT).item()


def max_distance_from_identity(u: Tensor, v: Tensor, scale: float, map: RotationMap = "cayley") -> float:
    """delta = the largest spectral norm of R_k - I over the rotations of a chain.

    Args:
        u, v, scale, map: as for :func:`chain`.

    Returns:
        A Python float, 0..2.

    Raises:
        UserError: unknown map.
    """
    planes = torch.cat([u, v], dim=-1)
    cores = rotation_cores(planes.mT @ planes, scale, map)
    # R_k - I = P S P^T; with P = Q C (QR) its norm is that of C S C^T.
    triangles = torch.linalg.qr(planes).R
    return torch.linalg.matrix_norm(triangles @ cores @ triangles.mT, 2).amax().item()


def chain_error_bound(delta: float, num_rotations: int, order: ChainOrder) -> float:
    """An upper bound of the spectral norm of R - R^(p), the error of a chain of order p.

    The terms that order p leaves out are the products of p + 2 and more factors R_k - I, hence
    the sum over j = p+2..m of C(m, j) delta^j.

    Args:
        delta: the largest ||R_k - I||_2, see :func:`max_distance_from_identity`.
        num_rotations: m.
        order: "exact" (bound 0) or p in 0..m-1.

    Raises:
        UserError: order out of range.
    """
    first = resolve_order(order, num_rotations) + 2
    return float(sum(math.comb(num_rotations, j) * delta**j for j in range(first, num_rotations + 1)))


def _diagonal_blocks(gram: Tensor, num_blocks: int) -> Tensor:
    """(m, w, w) from (mw, mw)."""
    width = gram.shape[0] // num_blocks
    return gram.view(num_blocks, width, num_blocks, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _left(middle: Tensor | None, x: Tensor) -> Tensor:
    """K x, for J = [[0, I], [-I, 0]] of x's height where no K is given."""
    if middle is not None:
        return middle @ x
    half = x.shape[-2] // 2
    return torch.cat([x[..., half:, :], -x[..., :half, :]], dim=-2)


def _cayley_cores(grams: Tensor, scale: float, middle: Tensor | None) -> Tensor:
    """S = (I - (s/2) K G)^-1 s K. Never singular for K = J: J G has the imaginary spectrum of P J P^T."""
    eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    # solve_ex does not look at the error code, hence does not wait for the device.
    return torch.linalg.solve_ex(
        eye - (scale / 2) * _left(middle, grams), (scale * _left(middle, eye)).expand_as(grams)
    ).result


def _exp_cores(grams: Tensor, scale: float, middle: Tensor | None) -> Tensor:
    """S = phi(X) s K with X = s K G and phi(X) = sum of X^n / (n+1)!, by scaling and doubling.

    torch.matrix_exp would copy norms to the host. Here the number of doublings stays on the device: the core
    of R^2 is 2 S + S G S, applied where a rotation still needs it. Accurate up to ||X||_1 = 2^12.
    """
    eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    x = scale * _left(middle, grams)
    norm = x.detach().abs().sum(-2).amax(-1)
    doublings = norm.log2().ceil().clamp(0, _MAX_DOUBLINGS)[..., None, None]
    shrink = torch.exp2(-doublings)
    x = x * shrink
    series = eye.expand_as(x)
    # 1 / 12! and 1 / 20! are below the rounding of float32 and float64.
    for n in range(11 if x.dtype == torch.float32 else 19, 1, -1):
        series = eye + (x @ series) / n
    core = series @ (scale * _left(middle, eye)) * shrink
    for i in range(_MAX_DOUBLINGS):
        core = torch.where(doublings > i, 2 * core + core @ grams @ core, core)
    return core
