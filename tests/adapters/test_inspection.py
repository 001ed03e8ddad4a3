"""Angles, orthogonality and intruder dimensions against dense linear algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, OFTConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from loco_diffusion.adapters import LoCAConfig, LoCOConfig, LOFTConfig
from loco_diffusion.adapters.inspection import (
    count_intruders,
    inspect,
    intruder_dimensions,
    rotation_angles,
    trained_parameters,
)
from loco_diffusion.errors import UserError
from loco_diffusion.rotations import ROTATION_MAPS, RotationMap, chain, dense


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 20, 3)
        self.linear = nn.Linear(20, 24)


SETTINGS: dict[str, Any] = {"target_modules": ["conv", "linear"]}


def adapted(config: PeftConfig) -> Any:
    torch.manual_seed(0)
    return get_peft_model(Net(), config)


def weights_of(model: Any) -> dict[str, Tensor]:
    """The adapter's weights as a file has them."""
    state = get_peft_model_state_dict(model)
    return {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(ROTATION_MAPS),
    st.floats(-3, 3),
    st.integers(0, 2**16),
)
def test_angles_are_those_of_the_dense_rotation(
    num_rotations: int, r: int, map: RotationMap, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, v = torch.randn(2, num_rotations, 24, r, dtype=torch.float64, generator=generator) / 5
    basis, core = chain(u, v, scale, map)
    angles = rotation_angles(basis, core)
    eigenvalues = torch.linalg.eigvals(dense(basis, core))
    expected = eigenvalues.angle().abs().sort(descending=True).values[: 2 * len(angles) : 2]
    assert angles.shape == (num_rotations * r,)
    torch.testing.assert_close(angles, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("map", "angle"), [("exp", 0.8), ("cayley", 2 * torch.tensor(0.4).atan().item())])
def test_the_angle_of_one_plane(map: RotationMap, angle: float) -> None:
    u, v = torch.eye(5)[:, :2].T[:, None, :, None]
    angles = rotation_angles(*chain(u, v, 0.8, map))
    torch.testing.assert_close(angles, torch.tensor([angle], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        LoCOConfig(r=2, num_rotations=2, alpha=5.0, init_weights=False, **SETTINGS),
        LoCOConfig(
            r=2, rank_pattern={"conv": 1}, num_rotations=2, side="both", init_weights=False, **SETTINGS
        ),
        LoCOConfig(r=1, num_rotations=3, side="output", magnitude=True, init_weights=False, **SETTINGS),
        LOFTConfig(r=5, init_weights=False, **SETTINGS),
        LOFTConfig(r=4, support="random", rank_pattern={"conv": 7}, init_weights=False, **SETTINGS),
    ],
)
def test_rotations_are_measured_without_the_base(config: LoCOConfig | LOFTConfig) -> None:
    model = adapted(config)
    measured = inspect(config, weights_of(model))
    assert measured is not None and (measured.quantity, measured.unit) == ("angle", "°")
    assert measured.spectra.keys() == measured.orthogonality_errors.keys()
    names = set()
    for path in ("conv", "linear"):
        layer = model.base_model.model.get_submodule(path)
        for side in layer.sides("default"):
            name = path if side == "input" else f"{path} (output)"
            expected = rotation_angles(*layer.get_chain("default", side)).rad2deg().tolist()
            assert measured.spectra[name] == pytest.approx(expected) and expected[0] > 0.1
            names.add(name)
    assert measured.spectra.keys() == names
    assert 0 < max(measured.orthogonality_errors.values()) < 1e-5


def test_a_support_that_was_never_fitted_has_no_angles() -> None:
    config = LOFTConfig(r=4, support="skew", **SETTINGS)
    with pytest.raises(UserError, match="fit_supports"):
        inspect(config, weights_of(adapted(config)))


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **SETTINGS),
        LoraConfig(
            r=4, use_rslora=True, rank_pattern={"conv": 2}, alpha_pattern={"conv": 3}, init_lora_weights=False,
            **SETTINGS,
        ),
    ],
)  # fmt: skip
def test_loras_are_measured_by_their_singular_values(config: LoraConfig) -> None:
    model = adapted(config)
    measured = inspect(config, weights_of(model))
    assert measured is not None and not measured.orthogonality_errors
    for path, values in measured.spectra.items():
        change = model.base_model.model.get_submodule(path).get_delta_weight("default").flatten(1)
        assert values == pytest.approx(torch.linalg.svdvals(change)[: len(values)].tolist(), rel=1e-4)
    assert measured.spectra.keys() == {"conv", "linear"}


def test_trained_parameters() -> None:
    """Of other methods too, which have nothing to measure; a frozen support is not trained."""
    for config in (
        OFTConfig(oft_block_size=4, target_modules=["linear"]),
        LoCAConfig(num_coefficients=7, **SETTINGS),
        LOFTConfig(r=5, **SETTINGS),
        LoCOConfig(r=1, num_rotations=2, **SETTINGS),
    ):
        model = adapted(config)
        weights = weights_of(model)
        assert trained_parameters(config, weights) == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
        measurable = isinstance(config, (LOFTConfig, LoCOConfig))
        assert (inspect(config, weights) is not None) == measurable


def test_intruders_are_new_leading_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 40, generator=generator)
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=generator)).Q
    assert intruder_dimensions(weight, weight) == intruder_dimensions(weight, weight @ rotation) == 0
    up, down = torch.randn(60, 3, generator=generator), torch.randn(3, 40, generator=generator)
    assert intruder_dimensions(weight, weight + 5 * up @ down) == 3
    assert intruder_dimensions(weight, weight + 5 * up @ down, top=2) == 2
    assert intruder_dimensions(weight, weight + 5 * up @ down, threshold=0.01) == 0
    kernel = weight.view(60, 10, 2, 2)
    assert intruder_dimensions(kernel, kernel + 5 * (up @ down).view_as(kernel)) == 3


def test_counting_merges_any_method() -> None:
    lora = adapted(LoraConfig(r=2, lora_alpha=400, init_lora_weights=False, **SETTINGS)).get_base_model()
    expected = {}
    for path in ("conv", "linear"):
        weight = lora.get_submodule(path).get_base_layer().weight.detach()
        expected[path] = intruder_dimensions(
            weight, weight + lora.get_submodule(path).get_delta_weight("default")
        )
    assert dict(count_intruders(lora, "default")) == expected and expected["conv"] > 0
    loco = adapted(
        LoCOConfig(r=2, num_rotations=2, alpha=8.0, init_weights=False, **SETTINGS)
    ).get_base_model()
    assert dict(count_intruders(loco, "default")) == {"conv": 0, "linear": 0}
