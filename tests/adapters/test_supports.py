"""LOFT's supports against full decompositions, and the gradients that some are chosen from."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from loco_diffusion.adapters.calibration import weight_gradients
from loco_diffusion.adapters.loft.supports import (
    SUPPORTS,
    Support,
    butterfly_directions,
    coordinate_axes,
    fit_support,
    householder_directions,
    skew_planes,
    top_right_singular_vectors,
)
from loco_diffusion.errors import UserError


def matrices(rows: int, columns: int, decay: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and a gradient, float64; with decay the singular values fall."""
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    falling = torch.arange(1, columns + 1, dtype=torch.float64) ** -decay
    return weight * falling, gradient * falling


def skew_signal(weight: Tensor, gradient: Tensor) -> Tensor:
    signal = weight.T @ gradient
    return (signal - signal.T) / 2


def top_share(matrix: Tensor, basis: Tensor) -> float:
    """How much of the best possible |M P|^2 a basis P holds."""
    best = torch.linalg.svdvals(matrix)[: basis.shape[1]].square().sum()
    return ((matrix @ basis).square().sum() / best).item()


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(SUPPORTS),
    st.integers(2, 40),
    st.integers(1, 30),
    st.integers(1, 10),
    st.integers(0, 100),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_every_support_is_orthonormal(
    support: Support, size: int, rows: int, half: int, seed: int, dtype: torch.dtype
) -> None:
    rank = min(2 * half, size // 2 * 2)
    weight, gradient = (m.to(dtype) for m in matrices(rows, size, seed=seed))
    gradient[1:] = gradient[:1]  # a gradient of rank 1 leaves most directions open
    basis = fit_support(support, size, rank, weight, gradient)
    assert basis.shape == (size, rank)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank).to(basis), atol=1e-5, rtol=0)


# 24 inputs are decomposed in full, 400 in a Krylov space.
@pytest.mark.parametrize(
    ("size", "decay", "share"), [(24, 0, 1 - 1e-9), (400, 0, 0.99), (400, 0.7, 1 - 1e-6)]
)
@pytest.mark.parametrize("rows", [20, 150])
def test_supports_hold_the_top_directions(size: int, decay: float, share: float, rows: int) -> None:
    weight, gradient = matrices(rows, size, decay)
    for matrix in (weight, gradient):
        assert top_share(matrix, top_right_singular_vectors(matrix, 6)) > share
    assert top_share(skew_signal(weight, gradient), skew_planes(weight, gradient, 6)) > share


@pytest.mark.parametrize("size", [24, 400])
def test_skew_planes_are_pairs(size: int) -> None:
    weight, gradient = matrices(30, size, decay=1.5)
    planes = skew_planes(weight, gradient, 6)
    coordinates = planes.T @ skew_signal(weight, gradient) @ planes
    speeds = coordinates.diagonal(1)[::2]
    assert (speeds[:-1].abs() > speeds[1:].abs()).all()
    pairs = torch.block_diag(*(torch.tensor([[0, s], [-s, 0]]) for s in speeds))
    torch.testing.assert_close(coordinates, pairs, atol=1e-6 * speeds[0].abs().item(), rtol=0)


def test_skew_planes_change_the_loss_fastest() -> None:
    """The derivative of <G, W exp(t A)> along the best A of norm 1 on a support, against random supports."""
    weight, gradient = matrices(30, 24)

    def speed(basis: Tensor) -> float:
        return (basis.T @ skew_signal(weight, gradient) @ basis).norm().item()

    best = speed(skew_planes(weight, gradient, 4))
    others = [speed(fit_support("random", 24, 4).double()) for _ in range(100)]
    assert best > max(*others, speed(top_right_singular_vectors(gradient, 4)))


def test_outputs_are_the_inputs_of_the_transposed_weight() -> None:
    weight, gradient = matrices(12, 24)
    planes = skew_planes(weight.transpose(0, 1), gradient.transpose(0, 1), 4)
    assert top_share(skew_signal(weight.T, gradient.T), planes) > 1 - 1e-9


def test_a_convolution_turns_its_input_channels() -> None:
    weight, gradient = matrices(5 * 3 * 2, 24)
    kernels = [m.view(5, 3, 2, 24).permute(0, 3, 1, 2) for m in (weight, gradient)]
    assert torch.equal(top_right_singular_vectors(kernels[0], 4), top_right_singular_vectors(weight, 4))
    assert torch.equal(skew_planes(*kernels, 4), skew_planes(weight, gradient, 4))


def test_drawn_supports() -> None:
    axes = coordinate_axes(10, 4)
    assert axes.sum(0).tolist() == [1] * 4 and axes.sum(1).max() == 1 and axes.unique().tolist() == [0, 1]
    assert (butterfly_directions(16, 16).abs() > 0).all()  # every coordinate reaches every other one
    assert torch.linalg.det(butterfly_directions(11, 11)) == pytest.approx(1, abs=1e-5)
    assert torch.linalg.det(householder_directions(11, 11)) == pytest.approx(-1, abs=1e-5)
    torch.manual_seed(0)
    first, second = fit_support("random", 10, 4), fit_support("random", 10, 4)
    torch.manual_seed(0)
    assert torch.equal(fit_support("random", 10, 4), first) and not torch.allclose(first, second)


def test_large_decompositions_leave_the_random_state_alone() -> None:
    weight, gradient = matrices(8, 200)
    state = torch.get_rng_state()
    assert torch.equal(skew_planes(weight, gradient, 4), skew_planes(weight, gradient, 4))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("support", "rank", "message"),
    [
        ("best", 4, "Unknown support 'best': choose one of principal, .*butterfly"),
        ("random", 0, "in 24 inputs takes r = 1 to 24, got 0"),
        ("principal", 25, "in 24 inputs takes r = 1 to 24, got 25"),
        ("skew", 3, "even r instead of 3"),
    ],
)
def test_bad_requests_are_refused(support: Support, rank: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit_support(support, 24, rank, *matrices(12, 24))
    with pytest.raises(UserError, match=r"call loco_diffusion\.adapters\.calibration\.fit_supports"):
        fit_support("gradient", 24, 4, matrices(12, 24)[0])


# Gradients for calibration.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2, dtype=torch.bfloat16)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(self.conv(x))).mean((2, 3)).bfloat16())


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) + torch.randn(2)).float().square().mean()


@pytest.fixture
def model() -> Net:
    """In training mode, with something frozen and a gradient from an earlier step."""
    torch.manual_seed(0)
    model = Net()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(2, dtype=torch.bfloat16)
    return model


def test_gradients_are_summed_and_the_model_stays_as_it_was(model: Net) -> None:
    batches = torch.randn(6, 5, 3, 8, 8)
    state = torch.get_rng_state()
    before = copy.deepcopy(model)
    gradients = weight_gradients(model, loss_fn, iter(batches), ["conv.weight", "head.weight"])
    assert torch.equal(torch.get_rng_state(), state)

    reference = copy.deepcopy(model).eval().requires_grad_()
    for batch in batches[:4]:
        loss_fn(reference, batch).backward()
    torch.testing.assert_close(gradients["conv.weight"], reference.conv.weight.grad)
    torch.testing.assert_close(
        gradients["head.weight"], reference.head.weight.grad.float(), rtol=0.02, atol=1e-3
    )
    assert gradients["head.weight"].dtype == torch.float32

    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for (name, value), (_, old) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(value, old), name
    for now, then in zip(model.parameters(), before.parameters(), strict=True):
        assert now.requires_grad == then.requires_grad
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"head.bias"}
    assert model.head.bias.grad.tolist() == [1, 1]


def test_a_failing_loss_leaves_the_model_as_it_was(model: Net) -> None:
    def fail(model: nn.Module, batch: Tensor) -> Tensor:
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        weight_gradients(model, fail, [torch.randn(1)], ["conv.weight"])
    assert model.training and not model.norm.training and not model.conv.weight.requires_grad


def batches() -> Iterator[Tensor]:
    yield torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["conv"], True, "no parameter 'conv'"),
        (
            ["conv.weight", "unused.weight"],
            True,
            "does not depend on 1 of 2 target weights .'unused.weight' first",
        ),
        (["conv.weight"], False, "no calibration batches"),
        (["int8"], True, "quantised weight 'int8'"),
    ],
)
def test_gradients_that_cannot_be_taken(model: Net, names: list[str], given: bool, message: str) -> None:
    model.int8 = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UserError, match=message):
        weight_gradients(model, loss_fn, batches() if given else [], names)
