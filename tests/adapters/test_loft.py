"""LOFT layers against dense float64 rotations, and the supports that are fitted to gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from loco_diffusion import rotations
from loco_diffusion.adapters import LoCOConfig, LOFTConfig, LOFTLayer
from loco_diffusion.adapters.calibration import fit_supports
from loco_diffusion.adapters.loft.layer import Conv2d, Linear
from loco_diffusion.adapters.loft.supports import GRADIENT_SUPPORTS, SUPPORTS, Support
from loco_diffusion.errors import UserError

IN, OUT = 20, 24
KINDS = ("linear", "conv2d")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(IN, OUT, (3, 2), padding=1)
        self.linear = nn.Linear(OUT, IN)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.dropout(torch.tanh(self.conv(x))).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def config(**changes: Any) -> LOFTConfig:
    chosen = {"r": 6, "target_modules": ["conv", "linear"], "init_weights": False}
    return LOFTConfig(**{**chosen, **changes})


def layer(kind: str = "linear", **changes: Any) -> LOFTLayer:
    """An evaluated, frozen float64 layer with an adapter that turns noticeably."""
    torch.manual_seed(0)
    if kind == "linear":
        made: LOFTLayer = Linear(nn.Linear(IN, OUT), "default", config(**changes))
    else:
        made = Conv2d(nn.Conv2d(IN, OUT, 3, stride=2, padding=1), "default", config(**changes))
    made = made.eval().requires_grad_(False).double()
    made.loft_basis["default"] = torch.linalg.qr(made.loft_basis["default"]).Q  # to the digits of float64
    return made


def dense_turn(made: LOFTLayer, strength: float = 1.0) -> Tensor:
    """U = I + P (R - I) P^T, from the definition."""
    basis = made.loft_basis["default"]
    r = basis.shape[1]
    small = torch.eye(r).double()
    if "default" in made.loft_matrix:
        change = strength * (made.loft_matrix["default"] - small)
    else:
        skew = torch.zeros(r, r).double()
        skew[tuple(torch.triu_indices(r, r, 1))] = strength * made.loft_skew["default"]
        skew = skew - skew.T
        change = torch.linalg.inv(small - skew / 2) @ (small + skew / 2) - small
    return torch.eye(len(basis)).double() + basis @ change @ basis.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("strength", [1.0, -0.5, 3.0])
def test_layer_equals_dense_reference(kind: str, free: bool, strength: float) -> None:
    made = layer(kind, free=free)
    made.set_scale("default", strength)
    base = made.get_base_layer()
    shape = (2, 5, IN) if kind == "linear" else (2, IN, 6, 5)
    x = torch.randn(shape, dtype=torch.float64)
    plain, adapted = base(x), made(x)
    turned = torch.einsum("oi...,ij->oj...", base.weight, dense_turn(made, strength))
    torch.testing.assert_close(made.get_delta_weight("default"), turned - base.weight, atol=1e-11, rtol=0)
    up, down = made.low_rank_delta("default")
    assert up.shape[1] == len(down) == 6 * (9 if kind == "conv2d" else 1)
    torch.testing.assert_close(
        (up.flatten(1) @ down.flatten(1)).view(base.weight.shape), turned - base.weight
    )
    base.weight.copy_(turned)
    torch.testing.assert_close(adapted, base(x), atol=1e-11, rtol=0)
    assert not torch.allclose(adapted, plain, atol=0.05)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SUPPORTS[3:]), st.integers(2, IN), st.floats(-20, 20), st.integers(0, 2**31))
def test_turns_by_orthogonal_matrices_at_any_strength(
    support: Support, r: int, strength: float, seed: int
) -> None:
    torch.manual_seed(seed)
    made = Linear(nn.Linear(IN, OUT), "default", config(r=r, support=support))
    basis, core = made.get_chain("default", scale=strength)
    assert basis.dtype == core.dtype == torch.float32
    turn = rotations.dense(basis, core)
    torch.testing.assert_close(turn @ turn.T, torch.eye(IN), atol=1e-5, rtol=0)
    inverse = rotations.dense(*made.get_chain("default", scale=-strength))
    torch.testing.assert_close(turn @ inverse, torch.eye(IN), atol=1e-5, rtol=0)


@pytest.mark.parametrize("r", [2, 3, 20])
def test_number_of_parameters(r: int) -> None:
    model = get_peft_model(net(), config(r=r, rank_pattern={"conv": 4}))
    assert model.get_nb_trainable_parameters()[0] == math.comb(r, 2) + math.comb(4, 2)
    free = get_peft_model(net(), config(r=r, free=True, rank_pattern={"conv": 1}))
    assert free.get_nb_trainable_parameters()[0] == r**2 + 1


def test_quantised_weights() -> None:
    quantised = nn.Linear(IN, OUT)
    quantised.weight = nn.Parameter((quantised.weight * 127).to(torch.int8), requires_grad=False)
    quantised.forward = lambda x: nn.functional.linear(x, quantised.weight.to(x) / 127, quantised.bias)
    made = Linear(quantised, "default", config(support="random")).eval()
    x = torch.randn(2, IN)
    expected = quantised(x @ rotations.dense(*made.get_chain("default")).T)
    torch.testing.assert_close(made(x), expected)
    waits = Linear(quantised, "default", config(support="principal"))  # to be loaded
    with pytest.raises(
        UserError, match="'principal' is chosen from the base weight, .* load a saved adapter"
    ):
        waits(x)


# Supports that are chosen from gradients.

BATCHES = torch.randn(6, 8, IN, 5, 5, generator=torch.Generator().manual_seed(2))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch.mean((2, 3))).square().mean()


@pytest.mark.parametrize("support", GRADIENT_SUPPORTS)
def test_fitting(support: Support, tmp_path: Path) -> None:
    model = get_peft_model(net(), config(support=support))
    x = BATCHES[0]
    model.save_pretrained(str(tmp_path))
    for unfitted in (model, PeftModel.from_pretrained(net(), str(tmp_path))):
        with pytest.raises(UserError, match=r"call loco_diffusion\.adapters\.calibration\.fit_supports"):
            unfitted(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    fit_supports(model, loss_fn, BATCHES)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"base_model.model.{name}.loft_basis.default" for name in ("conv", "linear")}
    assert model.training and {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert all(p.grad is None for p in model.parameters())

    for name in ("conv", "linear"):
        weight = net().get_submodule(name).weight.detach()
        gradient = base_gradient(name)
        signal = weight.movedim(1, -1).flatten(0, -2).T @ gradient.movedim(1, -1).flatten(0, -2)
        matrix = gradient.movedim(1, -1).flatten(0, -2) if support == "gradient" else signal - signal.T
        basis = model.base_model.model.get_submodule(name).loft_basis["default"]
        best = torch.linalg.svdvals(matrix)[:6].norm()
        torch.testing.assert_close((matrix @ basis).norm(), best, rtol=1e-3, atol=0)

    expected = model.eval()(x)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(net(), str(tmp_path)).eval()  # needs no calibration
    assert torch.equal(loaded(x), expected)


def base_gradient(name: str) -> Tensor:
    """The gradient of the loss of the first four batches with respect to a weight of Net."""
    model = net().eval()
    sum(loss_fn(model, batch) for batch in BATCHES[:4]).backward()
    return model.get_submodule(name).weight.grad


def test_fitting_again_takes_effect_in_evaluation() -> None:
    model = get_peft_model(net(), config(support="gradient")).eval()
    fit_supports(model, loss_fn, BATCHES[:1])
    with torch.no_grad():
        first = model(BATCHES[0])
        fit_supports(model, loss_fn, BATCHES[1:2])
        second = model(BATCHES[0])
        model.base_model.model.conv.clear_chains()
        model.base_model.model.linear.clear_chains()
        assert torch.equal(model(BATCHES[0]), second) and not torch.allclose(first, second)


def test_fitting_starts_loco_where_turning_counts() -> None:
    """The gradient of LoCO's angles, at the identity, is the largest in the planes of the skew signal."""

    def slope(init: str) -> float:
        loco = LoCOConfig(r=2, num_rotations=1, init=init, target_modules=["conv", "linear"])
        model = get_peft_model(net(), loco)
        if init == "skew":
            fit_supports(model, loss_fn, BATCHES)
        model.eval()
        sum(loss_fn(model, batch) for batch in BATCHES[:4]).backward()
        return sum(p.grad.square().sum().item() for n, p in model.named_parameters() if "loco_v" in n)

    assert slope("skew") > 2 * max(slope("random") for _ in range(3))


def test_other_adapters_are_off_while_fitting() -> None:
    model = net()
    inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False), model, "lora"
    )
    inject_adapter_in_model(config(support="gradient"), model, "turn")
    fit_supports(model, loss_fn, BATCHES, adapter_name="turn")
    plain = get_peft_model(net(), config(support="gradient"))
    fit_supports(plain, loss_fn, BATCHES)
    torch.testing.assert_close(
        model.conv.loft_basis["turn"], plain.base_model.model.conv.loft_basis["default"]
    )
    assert not model.linear.disable_adapters and not model.linear.base_layer.disable_adapters


def test_nothing_to_fit() -> None:
    model = get_peft_model(net(), config(support="random"))
    with pytest.raises(UserError, match="'default' has nothing to fit"):
        fit_supports(model, loss_fn, BATCHES)
    with pytest.raises(UserError, match="'other' has nothing to fit"):
        fit_supports(model, loss_fn, BATCHES, adapter_name="other")
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge the adapters first"):
        fit_supports(model, loss_fn, BATCHES)


# The configuration.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "LOFTConfig.r must be a whole number, at least 2, got 0"),
        ({"r": 1}, "LOFTConfig.r must be a whole number, at least 2, got 1"),
        ({"r": 0, "free": True}, "LOFTConfig.r must be a whole number, at least 1, got 0"),
        ({"r": 2.5}, "LOFTConfig.r must be a whole number"),
        ({"r": 3, "support": "skew"}, "LOFTConfig.r must be even"),
        ({"support": "skew", "rank_pattern": {"conv": 5}}, r"rank_pattern\['conv'\] must be even"),
        ({"rank_pattern": {"conv": True}}, r"rank_pattern\['conv'\] must be a whole number"),
        ({"support": "best"}, "LOFTConfig.support must be one of principal, gradient, .*, got 'best'"),
        ({"bias": "loco_only"}, "LOFTConfig.bias must be one of none, all, loft_only"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_config_round_trips(tmp_path: Path) -> None:
    made = config(rank_pattern={"conv": 4}, support="skew", free=True)
    made.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LOFT"
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, LOFTConfig) and loaded == made
