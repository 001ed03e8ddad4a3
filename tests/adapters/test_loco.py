"""LoCO's configuration, and its life inside peft and diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from loco_helpers import IN, OUT, adapted, config, net
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import convert_to_lora
from torch import Tensor, nn

from loco_diffusion import LoCOConfig
from loco_diffusion.adapters.calibration import fit_supports
from loco_diffusion.adapters.loco.layer import Linear
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


@pytest.mark.parametrize(("side", "channels"), [("input", "32 inputs"), ("both", "24 outputs")])
def test_layer_too_narrow(side: str, channels: str) -> None:
    r = 17 if side == "input" else 13
    with pytest.raises(
        UserError, match=rf"but {2 * r} \(r = {r}, num_rotations = 1\) exceeds the {channels}"
    ):
        Linear(nn.Linear(IN, OUT), "default", LoCOConfig(r=r, num_rotations=1, side=side))


@pytest.mark.parametrize("target", [nn.Conv2d(64, 64, 1, groups=2), nn.Conv1d(64, 64, 1), nn.LayerNorm(64)])
def test_other_layers_are_refused(target: nn.Module) -> None:
    with pytest.raises(UserError, match=f"'0' is a {type(target).__name__}"):
        get_peft_model(nn.Sequential(target), LoCOConfig(target_modules=["0"]))


def test_a_layer_that_torch_bypasses_is_refused() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2)})
    with pytest.raises(UserError, match="'attention.out_proj' is a NonDynamicallyQuantizableLinear"):
        get_peft_model(attention, LoCOConfig(target_modules=["out_proj"]))


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


class Blocks(nn.Module):
    """Two lists of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(IN, IN)}) for _ in range(3))
        self.inner = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(IN, IN)}) for _ in range(3))


@pytest.mark.parametrize("targets", [["proj"], r".*\.proj"])
@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"layers_to_transform": 1}, {"outer.1.proj", "inner.1.proj"}),
        ({"layers_to_transform": [0, 2], "layers_pattern": "inner"}, {"inner.0.proj", "inner.2.proj"}),
        ({"exclude_modules": r"outer\..*"}, {f"inner.{i}.proj" for i in range(3)}),
    ],
)
def test_selection_of_blocks(targets: Any, selection: dict[str, Any], expected: set[str]) -> None:
    model = nn.ModuleDict({"blocks": Blocks()})
    inject_adapter_in_model(config(target_modules=targets, **_in_blocks(selection)), model)
    assert adapted(model) == {f"blocks.{name}" for name in expected}


def _in_blocks(selection: dict[str, Any]) -> dict[str, Any]:
    pattern = selection.get("exclude_modules")
    return selection if pattern is None else {"exclude_modules": rf"blocks\.{pattern}"}


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


# Living in diffusers.


def flux(dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return (
        FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 2, 2),
        )
        .to(dtype)
        .eval()
    )


def run_flux(model: FluxTransformer2DModel, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = model.x_embedder.weight.dtype
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 6, 4, generator=generator).to(dtype),
            encoder_hidden_states=torch.randn(1, 3, 16, generator=generator).to(dtype),
            pooled_projections=torch.randn(1, 8, generator=generator).to(dtype),
            timestep=torch.tensor([0.5], dtype=dtype),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
            joint_attention_kwargs={"scale": scale},
        ).sample


def flux_config(**changes: Any) -> LoCOConfig:
    return LoCOConfig(**{"r": 2, "num_rotations": 2, "init_weights": False, **changes})


def test_strength_in_diffusers() -> None:
    model = flux()
    plain = run_flux(model)
    model.add_adapter(flux_config(), "a")
    model.add_adapter(flux_config(), "b")
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model.set_adapters(["a"], [1.0])
    full = run_flux(model)
    assert not torch.allclose(full, plain, atol=1e-3)
    assert torch.equal(run_flux(model, scale=0.0), plain)
    half = run_flux(model, scale=0.5)
    assert torch.equal(run_flux(model), full)
    model.set_adapters(["a"], [0.5])
    assert torch.equal(run_flux(model), half)
    model.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.equal(run_flux(model), full)
    model.disable_adapters()
    assert torch.equal(run_flux(model), plain)
    model.enable_adapters()
    model.set_adapters(["a"], [1.0])
    model.fuse_lora(lora_scale=0.5, safe_fusing=True)
    torch.testing.assert_close(run_flux(model), half, atol=1e-5, rtol=1e-4)
    model.unfuse_lora()
    model.set_adapters(["a"], [1.0])
    torch.testing.assert_close(run_flux(model), full, atol=1e-5, rtol=1e-4)
    model.delete_adapters("b")
    torch.testing.assert_close(run_flux(model), full, atol=1e-5, rtol=1e-4)
    model.unload_lora()
    assert not adapted(model)
    torch.testing.assert_close(run_flux(model), plain, atol=1e-5, rtol=1e-4)


def test_half_precision_model_gets_float32_adapter() -> None:
    model = flux(torch.bfloat16)
    plain = run_flux(model)
    inject_adapter_in_model(flux_config(init_weights=True), model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(run_flux(model), plain)


@pytest.mark.parametrize("loco_first", [True, False])
def test_stacks_with_lora(loco_first: bool) -> None:
    """On a layer that both adapt, the inner one is the base layer of the outer one, merged or not."""
    model = flux()
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    configs: list[PeftConfig] = [flux_config(), lora] if loco_first else [lora, flux_config()]
    for name, adapter_config in zip("ab", configs, strict=True):
        inject_adapter_in_model(adapter_config, model, name)
    expected = run_flux(model)
    for module in reversed(list(model.modules())):  # inner ones first
        if hasattr(module, "merge"):
            module.merge()
    torch.testing.assert_close(run_flux(model), expected, atol=1e-5, rtol=1e-4)
