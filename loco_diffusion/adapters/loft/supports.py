"""Where LOFT rotates: the supports, as pure functions on tensors.

A support is a frozen orthonormal basis P: (in, r) of the directions that an adapter turns; everything
orthogonal to it stays as it is (LOFT, arXiv 2605.11872). ``W`` and ``G`` are a layer's weight and the
gradient of a loss with respect to it: (out, in), or (out, in, kh, kw) for a convolution, whose input channels
are what turns. Results are float32, float64 for a float64 weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from loco_diffusion.errors import UserError

Support = Literal["principal", "gradient", "skew", "random", "coordinate", "householder", "butterfly"]
SUPPORTS: tuple[Support, ...] = get_args(Support)
WEIGHT_SUPPORTS: tuple[Support, ...] = ("principal", "skew")
GRADIENT_SUPPORTS: tuple[Support, ...] = ("gradient", "skew")

# The Krylov space: this many more columns than asked for, and this many products with the matrix.
_OVERSAMPLING = 8
_KRYLOV_STEPS = 6


def fit_support(
    support: Support, size: int, rank: int, weight: Tensor | None = None, gradient: Tensor | None = None
) -> Tensor:
    """The basis P of a support, for one layer.

    "random", "coordinate", "householder" and "butterfly" draw from torch's global generator, so that layers of
    one shape differ; the others are deterministic.

    Args:
        support: its name, see the functions below.
        size: the layer's inputs.
        rank: r, 1..size; even for "skew".
        weight: W, for "principal" and "skew".
        gradient: G, for "gradient" and "skew".

    Returns:
        (size, r), with orthonormal columns.

    Raises:
        UserError: unknown support, rank out of range, or no gradient where one is needed.
    """
    if support not in SUPPORTS:
        raise UserError(f"Unknown support {support!r}: choose one of {', '.join(SUPPORTS)}.")
    _check_rank(rank, size)
    if support in _DRAWN:
        return _DRAWN[support](size, rank)
    if support in GRADIENT_SUPPORTS and gradient is None:
        raise gradient_needed(support)
    if support == "skew":
        assert weight is not None and gradient is not None
        return skew_planes(weight, gradient, rank)
    matrix = weight if support == "principal" else gradient
    assert matrix is not None
    return top_right_singular_vectors(matrix, rank)


def gradient_needed(support: Support) -> UserError:
    """What to raise where a support is used before it has been chosen from a gradient."""
    return UserError(
        f"The support {support!r} is chosen from gradients: call "
        "loco_diffusion.adapters.calibration.fit_supports on a few batches first."
    )


def top_right_singular_vectors(matrix: Tensor, rank: int) -> Tensor:
    """``principal`` (of W) and ``gradient`` (of G): the right singular vectors of the largest singular values.

    Exact for small layers. For large ones a block Krylov method (Musco and Musco, arXiv 1504.05477) with a
    fixed start takes a few products with the matrix instead of a full decomposition. On a matrix of noise,
    the worst case, P keeps 99 % of the best possible ||W P||_F^2; where singular values decay it is exact to
    rounding.

    Args:
        matrix: (out, in) or (out, in, kh, kw).
        rank: r, 1..in.

    Returns:
        (in, r), in order of falling singular values.

    Raises:
        UserError: rank out of range.
    """
    matrix = _matrix(matrix)
    _check_rank(rank, matrix.shape[1])
    space = _krylov_space(lambda x: matrix.mT @ (matrix @ x), matrix, rank)
    # all of V^T, because a matrix with fewer rows than r has fewer singular values than r
    return space @ torch.linalg.svd(matrix @ space, full_matrices=True).Vh[:rank].mT


def skew_planes(weight: Tensor, gradient: Tensor, rank: int) -> Tensor:
    """``skew``: the planes in which a rotation of the inputs changes the loss fastest.

    To first order the loss of W exp(A), A skew, changes by <S, A> with S = (W^T G - G^T W) / 2. The top
    eigenspace of S^T S is therefore the best support; it consists of planes (a, b) with S a = s b and
    S b = -s a. Computed as :func:`top_right_singular_vectors` is, from products with W and G, without an
    (in, in) matrix for a large layer. For a rotation of the outputs, R W, pass both transposed
    (``weight.transpose(0, 1)``).

    Args:
        weight, gradient: (out, in) or (out, in, kh, kw).
        rank: r, even, 2..in.

    Returns:
        (in, r): columns 2i and 2i + 1 span a plane; the planes are in order of falling s.

    Raises:
        UserError: rank odd or out of range.
    """
    weight, gradient = _matrix(weight), _matrix(gradient)
    if rank % 2:
        raise UserError(f"Skew planes have two directions each: choose an even r instead of {rank}.")
    _check_rank(rank, weight.shape[1])

    def skew(x: Tensor) -> Tensor:
        return (weight.mT @ (gradient @ x) - gradient.mT @ (weight @ x)) / 2

    space = _krylov_space(lambda x: skew(skew(x)), weight, rank)
    small = space.mT @ skew(space)
    # i S is Hermitian: its eigenvectors for s > 0 are (a + i b) / sqrt(2).
    vectors = torch.linalg.eigh(1j * (small - small.mT)).eigenvectors
    top = vectors[:, -(rank // 2) :].flip(-1)
    return _orthonormal(space @ torch.stack([top.real, top.imag], dim=-1).flatten(-2))


def random_directions(size: int, rank: int) -> Tensor:
    """``random``: (size, rank), a subspace drawn uniformly (QR of a Gaussian matrix)."""
    return _orthonormal(torch.randn(size, rank))


def coordinate_axes(size: int, rank: int) -> Tensor:
    """``coordinate``: (size, rank), different coordinate axes drawn at random."""
    return torch.eye(size)[:, torch.randperm(size)[:rank]]


def householder_directions(size: int, rank: int) -> Tensor:
    """``householder``: (size, rank), the first r coordinate axes after r reflections I - 2 v v^T / |v|^2,
    each in a Gaussian vector v."""
    axes = torch.eye(size, rank)
    for v in torch.nn.functional.normalize(torch.randn(rank, size)):
        axes = axes - 2 * torch.outer(v, v @ axes)
    return axes


def butterfly_directions(size: int, rank: int) -> Tensor:
    """``butterfly``: (size, rank), the first r coordinate axes after ceil(log2(size)) butterfly stages.

    Stage s turns each pair of coordinates (i, i + 2^s), where bit s of i is 0, by an angle drawn uniformly
    from the circle. Where size is no power of two, coordinates without a partner rest.
    """
    axes = torch.eye(size, rank)
    index = torch.arange(size)
    for stage in range(math.ceil(math.log2(size))):
        partner = index ^ (1 << stage)
        low = index[(index < partner) & (partner < size)]
        high = partner[low]
        angle = 2 * math.pi * torch.rand(len(low), 1)
        turned = axes.clone()
        turned[low] = angle.cos() * axes[low] - angle.sin() * axes[high]
        turned[high] = angle.sin() * axes[low] + angle.cos() * axes[high]
        axes = turned
    return axes


_DRAWN: dict[str, Callable[[int, int], Tensor]] = {
    "random": random_directions,
    "coordinate": coordinate_axes,
    "householder": householder_directions,
    "butterfly": butterfly_directions,
}


def _matrix(weight: Tensor) -> Tensor:
    """The weight as (rows, in), in float32 at least."""
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return weight.movedim(1, -1).reshape(-1, weight.shape[1])


def _check_rank(rank: int, size: int) -> None:
    if not 1 <= rank <= size:
        raise UserError(f"A support in {size} inputs takes r = 1 to {size}, got {rank}.")


def _krylov_space(operator: Callable[[Tensor], Tensor], like: Tensor, rank: int) -> Tensor:
    """(in, k) orthonormal, k > rank, containing the operator's top eigenvectors; all of the space if small."""
    size, block = like.shape[1], rank + _OVERSAMPLING
    if block * (_KRYLOV_STEPS + 1) >= size:
        return torch.eye(size, dtype=like.dtype, device=like.device)
    start = torch.randn(size, block, generator=torch.Generator().manual_seed(0))
    blocks = [torch.linalg.qr(start.to(like)).Q]
    for _ in range(_KRYLOV_STEPS):
        blocks.append(torch.linalg.qr(operator(blocks[-1])).Q)
    return torch.linalg.qr(torch.cat(blocks, dim=1)).Q


def _orthonormal(columns: Tensor) -> Tensor:
    """Gram-Schmidt by QR: column i keeps its direction within the span of the first i."""
    q, r = torch.linalg.qr(columns)
    return q * torch.where(r.diagonal() < 0, -1, 1)
