"""Merged chains against the product of the rotations and the sum of the generators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loco_diffusion.adapters.combine import Chain, compose, lie
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
def test_what_does_not_fit_is_refused(merge: Merge) -> None:
    small, large = ((torch.zeros(1, n, 2), torch.zeros(1, n, 2), 1.0) for n in (8, 16))
    with pytest.raises(UserError, match="of 8 and 16 dimensions"):
        merge([large, small])
    with pytest.raises(UserError, match="12 directions .* the 8 of the layer"):
        merge([small] * 3)
