"""The rotations against explicit float64 matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loco_diffusion import rotations
from loco_diffusion.errors import UserError
from loco_diffusion.rotations import ROTATION_MAPS, RotationMap

N = 24
MAPS = st.sampled_from(ROTATION_MAPS)
SCALES = st.floats(-2, 2)
SIZES = st.floats(0, 3)
SEEDS = st.integers(0, 2**31)
examples = settings(max_examples=20, deadline=None)


def make_factors(seed: int, m: int, r: int, size: float, n: int = N) -> tuple[Tensor, Tensor]:
    """u with unit columns, v with columns of the given size: the planes turn by about scale * size."""
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, m, n, r, generator=generator, dtype=torch.float64)
    return u / u.norm(dim=1, keepdim=True), size * v / v.norm(dim=1, keepdim=True)


def single_rotations(u: Tensor, v: Tensor, scale: float, map: RotationMap) -> Tensor:
    generators = scale * (u @ v.transpose(1, 2) - v @ u.transpose(1, 2))
    if map == "exp":
        return torch.matrix_exp(generators)
    eye = torch.eye(u.shape[1], dtype=u.dtype)
    return torch.linalg.inv(eye - generators / 2) @ (eye + generators / 2)


def reference(u: Tensor, v: Tensor, scale: float, map: RotationMap) -> Tensor:
    product = torch.eye(u.shape[1], dtype=u.dtype)
    for rotation in single_rotations(u, v, scale, map):
        product = product @ rotation
    return product


@examples
@given(SEEDS, st.integers(1, 4), st.integers(1, 3), SIZES, SCALES, MAPS)
def test_exact_chain_is_the_product_of_the_rotations(
    seed: int, m: int, r: int, size: float, scale: float, map: RotationMap
) -> None:
    u, v = make_factors(seed, m, r, size)
    expected = reference(u, v, scale, map)
    for order in ("exact", m - 1):
        torch.testing.assert_close(
            rotations.dense(*rotations.chain(u, v, scale, map, order)), expected, atol=1e-12, rtol=0
        )


@examples
@given(SEEDS, st.integers(1, 4), st.integers(1, 3), SIZES, SCALES)
def test_one_solve_gives_the_core_of_the_products(
    seed: int, m: int, r: int, size: float, scale: float
) -> None:
    u, v = make_factors(seed, m, r, size)
    planes = torch.cat([u, v], dim=-1)
    basis = rotations.basis(u, v)
    cores = rotations.rotation_cores(planes.mT @ planes, scale, "cayley")
    expected = rotations.chain_core(cores, basis.mT @ basis)
    core = rotations.cayley_chain_core(basis.mT @ basis, m, scale)
    torch.testing.assert_close(core, expected, atol=1e-11, rtol=1e-9)


@examples
@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.floats(0, 0.5), st.floats(-1, 1), MAPS)
def test_exact_chain_with_any_middles(
    seed: int, m: int, r: int, size: float, scale: float, map: RotationMap
) -> None:
    u, v = make_factors(seed, m, r, size)
    planes = torch.cat([u, v], dim=-1)
    turns = rotations.plane_turns(m, r).double()
    torch.testing.assert_close(planes @ turns @ planes.mT, rotations.skew(u, v))
    middles = (
        turns + 0.2 * torch.randn(turns.shape, generator=torch.Generator().manual_seed(seed + 1)).double()
    )
    product = eye = torch.eye(N, dtype=u.dtype)
    for generator in scale * (planes @ middles @ planes.mT):
        if map == "exp":
            product = product @ torch.matrix_exp(generator)
        else:
            product = product @ torch.linalg.inv(eye - generator / 2) @ (eye + generator / 2)
    for order in ("exact", m - 1):
        made = rotations.dense(*rotations.chain(u, v, scale, map, order, middles))
        torch.testing.assert_close(made, product, atol=1e-10, rtol=1e-10)


@settings(max_examples=100, deadline=None)
@given(
    SEEDS,
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(0, 40),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    SIZES,
    SCALES,
    MAPS,
)
def test_exact_chain_is_orthogonal(
    seed: int, m: int, r: int, more: int, dtype: torch.dtype, size: float, scale: float, map: RotationMap
) -> None:
    """||R R^T - I||_2, for angles up to the 6 of the largest size and scale."""
    u, v = (t.to(dtype) for t in make_factors(seed, m, r, size, n=2 * r * m + more))
    basis, core = rotations.chain(u, v, scale, map)
    rotation = rotations.dense(basis.double(), core.double())
    error = rotation @ rotation.T - torch.eye(len(rotation), dtype=torch.float64)
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert torch.linalg.matrix_norm(error, 2).item() <= bound
    assert rotations.orthogonality_error(basis.double(), core.double()) <= bound * math.sqrt(2 * r * m)


@examples
@given(SEEDS, st.integers(2, 5), st.integers(1, 2), SIZES, SCALES, MAPS)
def test_truncated_chain_stays_within_the_bound(
    seed: int, m: int, r: int, size: float, scale: float, map: RotationMap
) -> None:
    u, v = make_factors(seed, m, r, size)
    singles = single_rotations(u, v, scale, map)
    delta = torch.linalg.matrix_norm(singles - torch.eye(N, dtype=u.dtype), 2).max().item()
    assert rotations.max_distance_from_identity(u, v, scale, map) == pytest.approx(delta, abs=1e-9)
    exact = reference(u, v, scale, map)
    for order in range(m):
        error = rotations.dense(*rotations.chain(u, v, scale, map, order)) - exact
        bound = rotations.chain_error_bound(delta, m, order)
        assert torch.linalg.matrix_norm(error, 2).item() <= bound + 1e-11
    assert rotations.chain_error_bound(delta, m, "exact") == 0


@examples
@given(SEEDS, st.integers(1, 3), SIZES, SCALES, MAPS)
def test_negative_scale_inverts_a_single_rotation(
    seed: int, r: int, size: float, scale: float, map: RotationMap
) -> None:
    u, v = make_factors(seed, 1, r, size)
    there = rotations.dense(*rotations.chain(u, v, scale, map))
    back = rotations.dense(*rotations.chain(u, v, -scale, map))
    torch.testing.assert_close(there @ back, torch.eye(N, dtype=u.dtype), atol=1e-12, rtol=0)


@pytest.mark.parametrize("map", ROTATION_MAPS)
@pytest.mark.parametrize("order", [0, 1, "exact"])
def test_inverse_core_inverts_every_chain(map: RotationMap, order: rotations.ChainOrder) -> None:
    u, v = make_factors(0, 3, 2, 0.5)
    basis, core = rotations.chain(u, v, 1.0, map, order)
    product = rotations.dense(basis, core) @ rotations.dense(basis, rotations.inverse_core(basis, core))
    torch.testing.assert_close(product, torch.eye(N, dtype=u.dtype), atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(N,), (5, N), (2, 3, N), (0, N)])
def test_apply_rotates_every_row(shape: tuple[int, ...]) -> None:
    u, v = make_factors(1, 3, 2, 1.0)
    basis, core = rotations.chain(u, v, 1.0)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(rotations.apply(x, basis, core), x @ rotations.dense(basis, core).T)


@pytest.mark.parametrize("map", ROTATION_MAPS)
def test_orthogonality_error_is_that_of_the_matrix(map: RotationMap) -> None:
    u, v = make_factors(2, 3, 2, 1.0)
    basis, core = rotations.chain(u, v, 1.0, map, 0)
    matrix = rotations.dense(basis, core)
    expected = torch.linalg.matrix_norm(matrix @ matrix.T - torch.eye(N, dtype=u.dtype)).item()
    assert rotations.orthogonality_error(basis, core) == pytest.approx(expected, rel=1e-10)
    assert expected > 0.1


@pytest.mark.parametrize("angle", [1e-6, 0.3, math.pi, 20.0])
def test_angles_in_one_plane(angle: float) -> None:
    u, v = torch.zeros(2, 1, 4, 1, dtype=torch.float64)
    u[0, 0], v[0, 1] = 1, angle
    turned = rotations.dense(*rotations.chain(u, v, 1.0, "exp"))[:2, :2]
    expected = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    torch.testing.assert_close(turned, expected.double(), atol=1e-6, rtol=0)
    turned = rotations.dense(*rotations.chain(u, v, 1.0, "cayley"))[:2, :2]
    assert math.atan2(turned[0, 1], turned[0, 0]) == pytest.approx(2 * math.atan(angle / 2))


@pytest.mark.parametrize("map", ROTATION_MAPS)
def test_gradients(map: RotationMap) -> None:
    u, v = make_factors(3, 2, 1, 0.7, n=5)

    def rotated(u: Tensor, v: Tensor) -> Tensor:
        return rotations.dense(*rotations.chain(u, v, 0.9, map))

    assert torch.autograd.gradcheck(rotated, (u.requires_grad_(), v.requires_grad_()))


@pytest.mark.parametrize("map", ROTATION_MAPS)
def test_identity_start_has_a_gradient(map: RotationMap) -> None:
    u, v = make_factors(4, 2, 2, 0.0)
    v.requires_grad_()
    basis, core = rotations.chain(u, v, 1.0, map)
    assert torch.equal(rotations.dense(basis, core), torch.eye(N, dtype=u.dtype))
    (rotations.dense(basis, core) * torch.randn(N, N, dtype=u.dtype)).sum().backward()
    assert v.grad is not None and v.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("map", ROTATION_MAPS)
def test_small_matrices_are_float32_even_under_autocast(dtype: torch.dtype, map: RotationMap) -> None:
    u, v = (t.to(dtype) for t in make_factors(5, 3, 2, 1.0))
    plain = rotations.chain(u, v, 1.0, map)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = rotations.chain(u, v, 1.0, map)
    for a, b in zip(plain, autocast, strict=True):
        assert a.dtype == b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(a, b)


def test_unknown_settings_are_refused() -> None:
    u, v = make_factors(6, 2, 1, 1.0)
    with pytest.raises(UserError, match="choose one of cayley, exp"):
        rotations.chain(u, v, 1.0, "euler")  # type: ignore[arg-type]
    for order in (-1, 2, True, "all"):
        with pytest.raises(UserError, match="whole number from 0 to 1"):
            rotations.chain(u, v, 1.0, "cayley", order)  # type: ignore[arg-type]
