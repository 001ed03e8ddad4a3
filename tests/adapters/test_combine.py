"""Merged rotations and adapters against the product of the rotations and the sum of the generators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from loco_diffusion.adapters import LoCOConfig, LOFTConfig
from loco_diffusion.adapters.combine import Combination, Weights, merge_adapters
from loco_diffusion.adapters.config import AdapterConfig
from loco_diffusion.adapters.loco.combine import Chain, compose, lie
from loco_diffusion.adapters.loft import combine as turns
from loco_diffusion.adapters.loft.layer import cayley_core, skew_matrix
from loco_diffusion.errors import UserError
from loco_diffusion.rotations import ROTATION_MAPS, RotationMap, chain, dense, skew

SIZE = 48
Merge = Callable[[Sequence[Chain]], tuple[Tensor, Tensor]]


@st.composite
def chains(draw: st.DrawFn) -> list[Chain]:
    """One to three chains of different lengths and ranks that fit into 48 dimensions."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def factor(rotations: int, planes: int) -> Tensor:
        return torch.randn(rotations, SIZE, planes, dtype=torch.float64, generator=generator) / SIZE**0.5

    sizes = draw(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 3)), min_size=1, max_size=3))
    scales = st.sampled_from([1.0, -0.5, 0.0, 2.5])
    return [(factor(*size), factor(*size), draw(scales)) for size in sizes]


@settings(deadline=None, max_examples=25)
@given(chains(), st.sampled_from(ROTATION_MAPS))
def test_compose_is_the_product(given_chains: list[Chain], map: RotationMap) -> None:
    expected = torch.eye(SIZE, dtype=torch.float64)
    for u, v, scale in given_chains:
        expected = expected @ dense(*chain(u, v, scale, map))
    merged = dense(*chain(*compose(given_chains), 1.0, map))
    torch.testing.assert_close(merged, expected, atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=25)
@given(chains())
def test_lie_adds_the_generators(given_chains: list[Chain]) -> None:
    generators = zip_longest(*(skew(u, v, scale) for u, v, scale in given_chains))
    expected = [sum(g for g in ks if g is not None) for ks in generators]
    torch.testing.assert_close(skew(*lie(given_chains)), torch.stack(expected), atol=1e-12, rtol=0)


@pytest.mark.parametrize("merge", [compose, lie])
def test_half_precision_factors_are_merged_in_float32(merge: Merge) -> None:
    u, v = torch.randn(2, 1, SIZE, 2, dtype=torch.bfloat16)
    merged_u, merged_v = merge([(u, v, 1.0), (u, v, 0.3)])
    assert merged_u.dtype == merged_v.dtype == torch.float32
    assert torch.equal(merged_v[-1, :, -2:], v[0].float() * 0.3)


@pytest.mark.parametrize("merge", [compose, lie])
def test_more_directions_than_there_are_are_refused(merge: Merge) -> None:
    with pytest.raises(UserError, match="12 directions .* the 8 of the layer"):
        merge([(torch.zeros(1, 8, 2), torch.zeros(1, 8, 2), 1.0)] * 3)


# LOFT's rotations.


def turn(r: int, scale: float, generator: torch.Generator) -> turns.Turn:
    basis = torch.linalg.qr(torch.randn(SIZE, r, dtype=torch.float64, generator=generator)).Q
    return basis, 0.05 * torch.randn(r * (r - 1) // 2, dtype=torch.float64, generator=generator), scale


def dense_skew(basis: Tensor, entries: Tensor, scale: float = 1.0) -> Tensor:
    return basis @ skew_matrix(scale * entries) @ basis.mT


def dense_turn(basis: Tensor, entries: Tensor, scale: float = 1.0) -> Tensor:
    return dense(basis, cayley_core(skew_matrix(scale * entries)))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(2, 20), st.sampled_from([1.0, -0.3, 0.0])), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_loft_rotations_are_merged_in_their_joint_span(
    sizes: list[tuple[int, float]], twice: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    given_turns = [turn(r, scale, generator) for r, scale in sizes]
    if twice:  # a support that two adapters share is not counted twice
        given_turns.append((given_turns[0][0], -given_turns[0][1] / 2, 1.0))
    width = min(sum(r for r, _ in sizes), SIZE)
    product = torch.eye(SIZE, dtype=torch.float64)
    for part in given_turns:
        product = product @ dense_turn(*part)
    for merge, expected, form in (
        (turns.compose, product, dense_turn),
        (turns.lie, sum(dense_skew(*part) for part in given_turns), dense_skew),
    ):
        basis, entries = merge(given_turns)
        assert basis.shape == (SIZE, width) and entries.dtype == torch.float64
        torch.testing.assert_close(form(basis, entries), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("angle", [90.0, 90.5])
def test_half_a_turn_has_no_cayley_transform(angle: float) -> None:
    """Two rotations of one plane that add up to it, or nearly."""
    scale = 2 * math.tan(math.radians(angle) / 2)
    part = torch.eye(SIZE)[:, :3], torch.tensor([1.0, 0.0, 0.0]), scale
    with pytest.raises(UserError, match="half a turn .* lower their strengths, or choose lie"):
        turns.compose([part, part])
    near, away = (turns.compose([part, (*part[:2], factor * scale)]) for factor in (0.95, -1.0))
    torch.testing.assert_close(dense_turn(*away), torch.eye(SIZE))
    torch.testing.assert_close(
        dense_turn(*near), dense_turn(*part) @ dense_turn(*part[:2], 0.95 * scale), atol=1e-5, rtol=0
    )
    basis, entries = turns.lie([part, part])
    torch.testing.assert_close(dense_skew(basis, entries), dense_skew(*part) * 2)


# Adapters.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 28, 3)
        self.linear = nn.Linear(28, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.conv(x)).flatten(2).mT)


def config(**changes: Any) -> LoCOConfig:
    settings = {"r": 2, "num_rotations": 1, "alpha": 6.0, "side": "input", "init_weights": False}
    return LoCOConfig(**{**settings, "target_modules": ["conv", "linear"], **changes})


def loaded(adapters: Sequence[tuple[AdapterConfig, Weights]], strengths: Sequence[float]) -> Tensor:
    """What a network with these adapters active in this order gives."""
    torch.manual_seed(0)
    model = get_peft_model(Net(), adapters[0][0], adapter_name="a0").eval()
    names = [f"a{number}" for number in range(len(adapters))]
    for name, (adapter_config, weights) in zip(names, adapters, strict=True):
        if name not in model.peft_config:
            model.add_adapter(name, adapter_config)
        state = {f"base_model.model.{key}": tensor for key, tensor in weights.items()}
        assert not set_peft_model_state_dict(model, state, adapter_name=name).unexpected_keys
    model.base_model.set_adapter(names)
    for layer in (model.base_model.model.conv, model.base_model.model.linear):
        for name, strength in zip(names, strengths, strict=True):
            layer.set_scale(name, strength)
    with torch.no_grad():
        return model(torch.randn(2, 24, 4, 4, generator=torch.Generator().manual_seed(1)))


def loft_config(**changes: Any) -> LOFTConfig:
    settings = {"r": 5, "target_modules": ["conv", "linear"], "init_weights": False}
    return LOFTConfig(**{**settings, **changes})


def adapter(
    seed: int, make: Callable[..., AdapterConfig] = config, **changes: Any
) -> tuple[AdapterConfig, Weights]:
    torch.manual_seed(seed)
    made = make(**changes)
    state = get_peft_model_state_dict(get_peft_model(Net(), made))
    return made, {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("side", ["input", "output", "both"])
@pytest.mark.parametrize("map", ROTATION_MAPS)
def test_composed_adapters_do_what_they_do_together(side: str, map: RotationMap) -> None:
    adapters = [
        adapter(1, side=side, map=map),
        adapter(2, side=side, map=map, num_rotations=2, r=1, alpha=4.0),
        adapter(3, side=side, map=map, rank_pattern={"conv": 1}, alpha_pattern={"linear": 3.0}),
    ]
    strengths = [1.0, -0.5, 0.7]
    merged = merge_adapters(adapters, "compose", strengths)
    assert (merged[0].r, merged[0].num_rotations, merged[0].rank_pattern) == (2, 4, {})
    expected = loaded(adapters, strengths)
    torch.testing.assert_close(loaded([merged], [1.0]), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(loaded(adapters[::-1], strengths[::-1]), expected, atol=1e-2)
    assert not torch.allclose(loaded(adapters, [0.0] * 3), expected, atol=1e-2)


def test_composed_loft_adapters_do_what_they_do_together() -> None:
    adapters = [
        adapter(1, loft_config, support="random"),
        adapter(2, loft_config, r=4, rank_pattern={"conv": 3}),
        adapter(3, loft_config, support="coordinate"),
    ]
    strengths = [1.0, -0.5, 0.7]
    merged = merge_adapters(adapters, "compose", strengths)
    assert (merged[0].r, merged[0].rank_pattern) in ((13, {"^linear": 14}), (14, {"^conv": 13}))
    expected = loaded(adapters, strengths)
    torch.testing.assert_close(loaded([merged], [1.0]), expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(loaded(adapters[::-1], strengths[::-1]), expected, atol=1e-3)


def test_a_lie_sum_of_loft_adapters_adds_what_they_have_learned() -> None:
    one = adapter(1, loft_config)
    merged = merge_adapters([one, one], "lie", [0.5, 1.5])
    assert merged[0].r == 5
    torch.testing.assert_close(loaded([merged], [1.0]), loaded([one], [2.0]), atol=1e-5, rtol=1e-4)


def test_a_lie_sum_adds_rotations_of_one_plane_and_magnitudes() -> None:
    """Two times the same generator turns by twice the angle, whatever the ranks say."""
    one = adapter(1, side="both", magnitude=True, map="exp", rank_pattern={"^conv": 1})
    merged = merge_adapters([one, one], "lie", [0.5, 1.5])
    assert merged[0].rank_pattern == {"^linear": 4} and merged[0].r == 2
    torch.testing.assert_close(loaded([merged], [1.0]), loaded([one], [2.0]), atol=1e-5, rtol=1e-4)
    other = adapter(2, side="both", magnitude=True, map="exp")
    swapped = [merge_adapters(pair, "lie", [1.0, 1.0]) for pair in ([one, other], [other, one])]
    torch.testing.assert_close(loaded(swapped[:1], [1.0]), loaded(swapped[1:], [1.0]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"map": "exp"}, "compose", "maps differ .cayley and exp."),
        ({"side": "output"}, "lie", "different sides of the layers .input and output."),
        ({"target_modules": ["conv"]}, "lie", "only one of them has linear.loco_u"),
        ({"free": True}, "lie", "Free LoCO adapters do more than rotate"),
        ({"num_rotations": 2, "chain_order": 0}, "compose", 'chain_order 0 .* train it with "exact"'),
        ({"bias": "loco_only"}, "compose", "biases or whole modules"),
        ({"r": 6, "alpha": 6.0, "num_rotations": 2}, "compose", "36 directions .* more than the 24 of"),
    ],
)
def test_adapters_that_differ_are_refused(changes: dict[str, Any], how: Combination, message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_adapters([adapter(1), adapter(2, **changes)], how, [1.0, 1.0])


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 40, 3)
        self.linear = nn.Linear(40, 24)


@pytest.mark.parametrize("make", [config, loft_config])
def test_layers_of_different_shapes_are_named(make: Callable[..., AdapterConfig]) -> None:
    wide = get_peft_model_state_dict(get_peft_model(Wider(), make()))
    other = make(), {name.removeprefix("base_model.model."): tensor for name, tensor in wide.items()}
    one = adapter(1, make)
    with pytest.raises(UserError, match="in their order, linear has 28, 28, 40 inputs; merge adapters of"):
        merge_adapters([one, one, other], "lie", [1.0, 1.0, 1.0])


def test_a_magnitude_of_another_shape_is_named() -> None:
    one, other = adapter(1, magnitude=True), adapter(2, magnitude=True)
    wide = {**other[1], "linear.loco_m_out": torch.zeros(30)}
    with pytest.raises(UserError, match="linear has 24, 30 outputs"):
        merge_adapters([one, (other[0], wide)], "lie", [1.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"free": True}, "Free LOFT adapters"),
        ({"support": "skew", "r": 4}, "chosen from gradients: call"),
        ({"target_modules": ["conv"]}, "only one of them has linear.loft_basis"),
    ],
)
def test_loft_adapters_that_cannot_be_merged(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge_adapters([adapter(1, loft_config), adapter(2, loft_config, **changes)], "lie", [1.0, 1.0])


def test_one_adapter_has_one_method() -> None:
    with pytest.raises(UserError, match="these are LOFT and LoCO"):
        merge_adapters([adapter(1), adapter(2, loft_config)], "compose", [1.0, 1.0])


def test_magnitudes_cannot_be_composed() -> None:
    with pytest.raises(UserError, match="choose lie"):
        merge_adapters([adapter(1, magnitude=True)] * 2, "compose", [1.0, 1.0])
