"""Weight changes with a few non-zero cosine coefficients, as pure functions on tensors.

The mathematics of LoCA ("LoCA: Location-aware cosine adaptation", arXiv 2502.06820): a change of a weight is

    dW = C_out^T S C_in        C: orthonormal DCT-II matrices        S: (out, in), n values at chosen cells

S is held as its entries (values, rows, columns). :func:`apply` uses dW on activations without forming it,
:func:`dense` forms it. Gradients with respect to the values are the 2-D DCT of dL/dW at their cells; those
with respect to the locations are central differences of it, see :func:`entries`. Transforms are computed in
float32 at least (float64 in gives float64), also under autocast; nothing synchronises with the host.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Up to this length a product with the DCT matrix, made on the spot, is faster than the dozen passes over the data
# that a transform by FFT consists of (benchmarks/dct_speed.py: at 128 no more). Its rows from 192 to 768 were
# measured on a busy processor and do not settle what is faster there.
MATRIX_LENGTH = 96


class Entries(NamedTuple):
    """A sparse matrix: values, and their rows and columns, each (k,); values at one cell add up."""

    values: Tensor
    rows: Tensor
    columns: Tensor


def entries(coefficients: Tensor, locations: Tensor, shape: tuple[int, int]) -> Entries:
    """The entries of S.

    A location has no gradient of its own, because it is rounded to a cell. While ``locations`` requires one,
    S therefore gets a zero at each of the four neighbours of every cell; what the loss would gain from
    coefficients there, z = dL/dS, gives dL/dl = a / 2 * (z_next - z_previous) for each of the two axes,
    clipped to -1..1. At the border of the grid the missing neighbour is the cell itself.

    Args:
        coefficients: a, (n,).
        locations: l, (2, n), of rows and columns, in 0..1: scaled to the grid, rounded and clamped to it.
        shape: (out, in), the grid.

    Returns:
        n entries, or 5 n with the neighbours.
    """
    rows, columns = (
        (along.detach() * (size - 1)).round().long().clamp(0, size - 1)
        for along, size in zip(locations, shape, strict=True)
    )
    if not (locations.requires_grad and torch.is_grad_enabled()):
        return Entries(coefficients, rows, columns)
    probes = _LocationProbes.apply(locations, coefficients)
    last_row, last_column = shape[0] - 1, shape[1] - 1
    near_rows = [(rows + 1).clamp(max=last_row), (rows - 1).clamp(min=0), rows, rows]
    near_columns = [columns, columns, (columns + 1).clamp(max=last_column), (columns - 1).clamp(min=0)]
    return Entries(
        torch.cat([coefficients, probes.flatten()]),
        torch.cat([rows, *near_rows]),
        torch.cat([columns, *near_columns]),
    )


def apply(x: Tensor, sparse: Entries, out_features: int) -> Tensor:
    """dW x for row vectors: x -> x C_in^T S^T C_out, that is two transforms and n products a row.

    Args:
        x: (..., in).
        sparse: the entries of S.
        out_features: out.

    Returns:
        (..., out), in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # The sums over each row of S are those of an embedding bag, which gathers nothing that it must keep, and
    # keeps the transformed activations in x's dtype for the backward pass.
    spectrum = dct(x.reshape(-1, x.shape[-1]).to(dtype)).to(x.dtype)
    order = sparse.rows.argsort(stable=True)  # zeros for the neighbours must not change the order of a sum
    ends = torch.arange(out_features + 1, device=x.device)
    sums = torch.nn.functional.embedding_bag(
        sparse.columns[order],
        spectrum.mT.contiguous(),
        torch.searchsorted(sparse.rows[order], ends),
        mode="sum",
        per_sample_weights=sparse.values[order].to(x.dtype),
        include_last_offset=True,
    )
    return idct(sums.mT.to(dtype)).to(x.dtype).view(*x.shape[:-1], out_features)


def dense(sparse: Entries, shape: tuple[int, int]) -> Tensor:
    """dW = C_out^T S C_in: (out, in), in the values' dtype."""
    matrix = sparse.values.new_zeros(shape)
    matrix = matrix.index_put((sparse.rows, sparse.columns), sparse.values, accumulate=True)
    return idct(idct(matrix).mT).mT


def dct(x: Tensor) -> Tensor:
    """The orthonormal DCT-II of the rows, x C^T: (..., N) to (..., N); float32 or float64."""
    transformed: Tensor = _Transform.apply(x, False)
    return transformed


def idct(x: Tensor) -> Tensor:
    """The inverse of :func:`dct`, which is its transpose, x C: (..., N) to (..., N); float32 or float64."""
    transformed: Tensor = _Transform.apply(x, True)
    return transformed


def dct_matrix(size: int, like: Tensor) -> Tensor:
    """C: (size, size), of the dtype and on the device of ``like``."""
    steps = torch.arange(size, device=like.device)
    quarters = torch.outer(steps, 2 * steps + 1) % (4 * size)  # a small angle keeps its digits
    matrix = torch.cos(quarters.to(like.dtype) * (math.pi / (2 * size))) * math.sqrt(2 / size)
    matrix[0] = math.sqrt(1 / size)
    return matrix


class _LocationProbes(torch.autograd.Function):
    """Zeros, (4, n), at next row, previous row, next column, previous column; see :func:`entries`."""

    @staticmethod
    def forward(ctx: Any, locations: Tensor, coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients)
        return coefficients.new_zeros(4, len(coefficients))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (coefficients,) = ctx.saved_tensors
        difference = gradient[0::2] - gradient[1::2]
        return (coefficients / 2 * difference).clamp(-1, 1), None


class _Transform(torch.autograd.Function):
    """The transform or its inverse; each is the other's gradient, and neither keeps anything."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: bool) -> Tensor:
        ctx.inverse = inverse
        with torch.autocast(x.device.type, enabled=False):
            if x.shape[-1] <= MATRIX_LENGTH:
                matrix = dct_matrix(x.shape[-1], x)
                return x @ (matrix if inverse else matrix.mT)
            return _inverse_by_fft(x) if inverse else _by_fft(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Transform.apply(gradient, not ctx.inverse), None


# J. Makhoul, "A fast cosine transform in one and two dimensions", 1980: with v the even samples followed by
# the odd ones backwards, and V its Fourier transform, X_k - i X_{N-k} = w_k V_k.


def _by_fft(x: Tensor) -> Tensor:
    if x.numel() == 0:  # MKL's transforms of no rows fail in some versions of torch (2.14)
        return x
    size = x.shape[-1]
    reordered = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    pairs = torch.fft.rfft(reordered) * _turns(size, x)
    return torch.cat([pairs.real, -pairs.imag[..., 1 : (size + 1) // 2].flip(-1)], dim=-1)


def _inverse_by_fft(x: Tensor) -> Tensor:
    if x.numel() == 0:
        return x
    size = x.shape[-1]
    half = size // 2 + 1
    mirrored = torch.cat([torch.zeros_like(x[..., :1]), x[..., half - size - 1 :].flip(-1)], dim=-1)
    pairs = torch.complex(x[..., :half], -mirrored[..., :half])
    reordered = torch.fft.irfft(pairs / _turns(size, x), n=size)
    result = torch.empty_like(x)
    result[..., ::2] = reordered[..., : (size + 1) // 2]
    result[..., 1::2] = reordered[..., (size + 1) // 2 :].flip(-1)
    return result


def _turns(size: int, like: Tensor) -> Tensor:
    """w_k = sqrt(2 / N) exp(-i pi k / 2N), for k = 0..N/2, with sqrt(1 / N) for k = 0."""
    angles = torch.arange(size // 2 + 1, dtype=like.dtype, device=like.device) * (-math.pi / (2 * size))
    scale = torch.full_like(angles, math.sqrt(2 / size))
    scale[0] = math.sqrt(1 / size)
    return torch.polar(scale, angles)
