"""LoCO's configuration, and its life inside peft and diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loco_helpers import IN, OUT, adapted, config, net
from peft import (
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import convert_to_lora
from torch import Tensor, nn

from loco_diffusion import LoCOConfig
from loco_diffusion.adapters.calibration import fit_supports
from loco_diffusion.errors import UserError

# The configuration.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r must be a whole number above 0"),
        ({"r": 1.5}, "r must be a whole number above 0"),
        ({"num_rotations": -1}, "num_rotations must be a whole number above 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"alpha": "4"}, "alpha must be a finite number"),
        ({"alpha": 0}, "alpha must be a finite number other than 0"),
        ({"map": "euler"}, "map must be one of cayley, exp"),
        ({"side": "left"}, "side must be one of input, output, both"),
        ({"init": "pca"}, "init must be one of random, skew"),
        ({"rank_pattern": {"first": 0}}, r"rank_pattern\['first'\] must be a whole number above 0"),
        ({"alpha_pattern": {"first": "a"}}, r"alpha_pattern\['first'\] must be a finite number"),
        ({"chain_order": 3}, "chain_order must be .* from 0 to 2"),
        ({"chain_order": -1}, "chain_order must be .* from 0 to 2"),
        ({"chain_order": "all"}, "chain_order must be .* from 0 to 2"),
        ({"bias": "lora_only"}, "bias must be one of none, all, loco_only"),
        ({"layers_pattern": "blocks"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_config_round_trips(tmp_path: Path) -> None:
    made = config(
        r=3,
        alpha=1.5,
        chain_order=1,
        map="exp",
        side="both",
        magnitude=True,
        rank_pattern={"first": 1},
        bias="loco_only",
        exclude_modules=["b", "a"],
        modules_to_save=["h"],
    )
    made.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LOCO" and written["exclude_modules"] == ["a", "b"]
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, LoCOConfig) and loaded == made


def test_an_unknown_model_needs_target_modules() -> None:
    for targets in (None, "attention"):
        with pytest.raises(UserError, match="no default target_modules for Net"):
            get_peft_model(net(), LoCOConfig(target_modules=targets))
    everything = get_peft_model(net(), config(target_modules="all-linear"))
    assert len(adapted(everything)) == 3
    everything.add_adapter("again", config(target_modules="all-linear"))
    assert len(adapted(everything)) == 3


def test_ranks_and_alphas_by_layer() -> None:
    model = get_peft_model(
        net(), config(rank_pattern={"first": 4, "sec.*": 1}, alpha_pattern={"base|second": 3.0})
    ).base_model.model
    assert model.first.r == {"default": 4} and model.first.loco_u["default"].shape == (3, IN, 4)
    assert model.second.r == {"default": 1} and model.second.loco_u["default"].shape == (3, OUT, 1)
    assert model.first.scaling == {"default": 1.0} and model.second.scaling == {"default": 3.0}


# Living in peft.


def test_parameters() -> None:
    model = get_peft_model(net().bfloat16(), config())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"base_model.model.{m}.loco_{f}.default" for m in ("first", "second") for f in ("u", "v")
    }
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert "loco.Linear" in repr(model)
    plain = get_peft_model(net().bfloat16(), config(), autocast_adapter_dtype=False)
    assert plain.base_model.model.first.loco_u["default"].dtype == torch.bfloat16


@pytest.mark.parametrize("bias", ["all", "loco_only"])
def test_bias(bias: str) -> None:
    model = get_peft_model(net(), config(bias=bias))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    expected = {"base_model.model.first.base_layer.bias"}
    assert trained == (expected | {"base_model.model.head.bias"} if bias == "all" else expected)


def test_state_dict_helpers() -> None:
    source = get_peft_model(net(), config()).eval()
    state = get_peft_model_state_dict(source)
    assert sorted(state) == [
        f"base_model.model.{m}.loco_{f}" for m in ("first", "second") for f in ("u", "v")
    ]
    target = get_peft_model(net(), config(), adapter_name="a").eval()
    x = torch.randn(5, IN)
    target(x)
    outcome = set_peft_model_state_dict(target, state, adapter_name="a")
    assert not outcome.unexpected_keys
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("side", ["input", "output"])
def test_peft_converts_it_to_lora_exactly(side: str) -> None:
    model = get_peft_model(net(), config(target_modules=["first"], side=side)).eval()
    x = torch.randn(5, IN)
    lora_config, state = convert_to_lora(model, rank=12)
    lora = get_peft_model(net(), lora_config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(x), model(x), atol=1e-5, rtol=1e-4)


def test_adapter_names_are_checked() -> None:
    model = get_peft_model(net(), config())
    x = torch.randn(2, IN)
    with pytest.raises(UserError, match=r"call model.eval\(\) first"):
        model(x, adapter_names=["default", "default"])
    with pytest.raises(UserError, match="no adapter style: adapter_names may use default and __base__"):
        model.eval()(x, adapter_names=["default", "style"])


@pytest.mark.parametrize("side", ["input", "both"])
def test_planes_fitted_on_batches_start_steeper(side: str) -> None:
    torch.manual_seed(1)
    batch = torch.randn(64, IN), torch.randn(64, 3)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    slopes = {}
    for init in ("random", "skew"):
        model = get_peft_model(net(), config(init=init, init_weights=True, side=side))
        if init == "skew":
            fit_supports(model, loss_fn, [batch])
        loss = loss_fn(model, batch)
        torch.testing.assert_close(loss, loss_fn(net(), batch))
        loss.backward()
        slopes[init] = sum(p.grad.square().sum() for n, p in model.named_parameters() if "loco_v" in n)
    assert slopes["skew"] > 1.5 * slopes["random"]
