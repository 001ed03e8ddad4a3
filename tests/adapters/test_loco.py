"""LoCO layers against dense float64 rotations, and LoCO's life inside peft and diffusers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import convert_to_lora
from torch import Tensor, nn

from loco_diffusion import LoCOConfig
from loco_diffusion.adapters import LoCOLayer, default_target_modules
from loco_diffusion.adapters.loco.layer import Linear
from loco_diffusion.errors import UserError

IN, OUT = 32, 24


class Net(nn.Module):
    """Two layers that the adapters sit on, and one that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(IN, OUT)
        self.second = nn.Linear(OUT, IN, bias=False)
        self.head = nn.Linear(IN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


def config(**changes: Any) -> LoCOConfig:
    settings = {"r": 2, "num_rotations": 3, "target_modules": ["first", "second"], "init_weights": False}
    return LoCOConfig(**{**settings, **changes})


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def layer(dtype: torch.dtype = torch.float64, **changes: Any) -> Linear:
    """An evaluated, frozen layer with an adapter that turns noticeably."""
    torch.manual_seed(0)
    made = Linear(nn.Linear(IN, OUT, dtype=dtype), "default", config(**changes)).eval().requires_grad_(False)
    for v in made.loco_v.values():
        v.mul_(8)
    return made


def dense_rotation(made: Linear, adapter: str = "default") -> Tensor:
    """The adapter's R_1 ... R_m as a float64 matrix, from the definition."""
    product = torch.eye(made.in_features, dtype=torch.float64)
    eye = product
    for u, v in zip(made.loco_u[adapter].double(), made.loco_v[adapter].double(), strict=True):
        generator = made.scaling[adapter] * (u @ v.T - v @ u.T)
        if made.rotation_map[adapter] == "exp":
            product = product @ torch.matrix_exp(generator)
        else:
            product = product @ torch.linalg.inv(eye - generator / 2) @ (eye + generator / 2)
    return product


def base(made: Linear, x: Tensor) -> Tensor:
    return made.get_base_layer()(x)


# The layer's mathematics.


@pytest.mark.parametrize("map", ["cayley", "exp"])
@pytest.mark.parametrize("strength", [1.0, -0.5, 3.0])
@pytest.mark.parametrize("training", [True, False])
def test_layer_equals_dense_reference(map: str, strength: float, training: bool) -> None:
    made = layer(map=map, alpha=3.0).to(torch.float64).train(training)
    made.set_scale("default", strength)
    assert made.scaling["default"] == strength * 3.0 / 2
    linear = made.get_base_layer()
    x = torch.randn(2, 5, IN, dtype=torch.float64)
    expected = nn.functional.linear(x, linear.weight @ dense_rotation(made), linear.bias)
    torch.testing.assert_close(made(x), expected, atol=1e-11, rtol=0)
    assert not torch.allclose(expected, linear(x), atol=0.1)


def test_starts_at_the_identity_with_a_gradient() -> None:
    made = layer(torch.float32, init_weights=True).train()
    made.loco_v.requires_grad_()
    made.loco_u.requires_grad_()
    torch.testing.assert_close(made.loco_u["default"].norm(dim=1), torch.ones(3, 2))
    x = torch.randn(4, IN)
    out = made(x)
    assert torch.equal(out, base(made, x))
    out.square().sum().backward()
    assert made.loco_v["default"].grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["exact", 0, 1])
def test_weight_path_equals_activation_path(dtype: torch.dtype, order: int | str) -> None:
    made = layer(dtype, chain_order=order)
    weight = made.get_base_layer().weight.clone()
    x = torch.randn(7, IN, dtype=dtype)
    before, untouched = made(x), base(made, x)
    delta = made.get_delta_weight("default")
    made.merge(safe_merge=True)
    merged = made.get_base_layer().weight
    assert merged.dtype == dtype and made.merged
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(made(x), before, atol=tolerance, rtol=0)
    assert (before - untouched).abs().max() > 5 * tolerance
    torch.testing.assert_close(merged.double() - weight.double(), delta.double(), atol=tolerance, rtol=0)
    made.unmerge()
    assert not made.merged
    torch.testing.assert_close(made.get_base_layer().weight, weight, atol=tolerance / 10, rtol=0.01)
    with pytest.warns(UserWarning, match="Already unmerged"):
        made.unmerge()


def test_strength_zero_is_the_base_layer_bit_for_bit() -> None:
    made = layer(torch.float32)
    x = torch.randn(3, IN)
    weight = made.get_base_layer().weight.clone()
    made.scale_layer(0)
    assert torch.equal(made(x), base(made, x))
    made.merge()
    assert torch.equal(made.get_base_layer().weight, weight)
    made.unmerge()
    assert torch.equal(made.get_base_layer().weight, weight)


def test_scale_methods() -> None:
    made = layer(alpha=6.0)
    made.scale_layer(0.5)
    assert made.scaling["default"] == 1.5
    made.unscale_layer(0.5)
    assert made.scaling["default"] == 3.0
    made.scale_layer(0.3)
    made.unscale_layer()
    assert made.scaling["default"] == 3.0
    made.set_scale("unknown", 2.0)
    assert made.scaling == {"default": 3.0}


def test_unmerge_uses_the_strength_of_the_merge() -> None:
    made = layer()
    weight = made.get_base_layer().weight.clone()
    made.scale_layer(0.5)
    made.merge()
    made.unscale_layer(0.5)
    made.unmerge()
    torch.testing.assert_close(made.get_base_layer().weight, weight, atol=1e-6, rtol=0)


def test_adapters_compose_in_order_of_activation() -> None:
    made = layer()
    made.update_layer("other", config(map="exp", r=3, num_rotations=2))
    made.loco_v["other"].data *= 8
    made.to(torch.float64)
    linear = made.get_base_layer()
    weight = linear.weight.clone()
    x = torch.randn(4, IN, dtype=torch.float64)
    for names in (["default", "other"], ["other", "default"]):
        made.set_adapter(names, inference_mode=True)
        rotation = dense_rotation(made, names[0]) @ dense_rotation(made, names[1])
        expected = nn.functional.linear(x, linear.weight @ rotation, linear.bias)
        torch.testing.assert_close(made(x), expected, atol=1e-11, rtol=0)
        made.merge()
        torch.testing.assert_close(made(x), expected, atol=1e-11, rtol=0)
        made.unmerge()
        made.merge(adapter_names=names[1:])
        assert made.merged_adapters == names[1:]
        torch.testing.assert_close(linear.weight, weight @ dense_rotation(made, names[1]), atol=1e-11, rtol=0)
        made.unmerge()
        torch.testing.assert_close(linear.weight, weight, atol=1e-11, rtol=0)


def test_safe_merge_refuses_broken_weights_and_changes_nothing() -> None:
    made = layer(torch.float32)
    weight = made.get_base_layer().weight.clone()
    made.loco_v["default"][0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        made.merge(safe_merge=True)
    assert torch.equal(made.get_base_layer().weight, weight) and not made.merged


def test_integer_weights_rotate_but_do_not_merge() -> None:
    class Int8Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) / 127, self.bias)

    quantised = Int8Linear(IN, OUT)
    quantised.weight = nn.Parameter((quantised.weight * 127).to(torch.int8), requires_grad=False)
    made = Linear(quantised, "default", config()).eval()
    x = torch.randn(2, IN)
    expected = quantised(x @ dense_rotation(made).float().T)
    torch.testing.assert_close(made(x), expected)
    with pytest.raises(UserError, match="without quantisation"):
        made.merge()


@pytest.mark.parametrize("training", [True, False])
def test_autocast_and_half_precision(training: bool) -> None:
    made = layer(torch.float32).train(training)
    x = torch.randn(5, IN)
    exact = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, atol=0.05, rtol=0)
    made.get_base_layer().to(torch.bfloat16)
    half = made(x.bfloat16())
    assert half.dtype == torch.bfloat16 and made.loco_u["default"].dtype == torch.float32
    torch.testing.assert_close(half.float(), exact, atol=0.05, rtol=0)


def test_compiles_into_one_graph() -> None:
    made = layer(torch.float32).train()
    made.update_layer("other", config(map="exp"))
    made.set_adapter(["default", "other"])
    x = torch.randn(5, IN)
    torch._dynamo.reset()
    out = torch.compile(made, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(out, made(x))
    out.sum().backward()
    assert made.loco_v["default"].grad is not None


# The chains that evaluation keeps.


def kept_chain(made: Linear) -> tuple[Tensor, Tensor] | None:
    kept = made._kept.get(("default", "input"))
    return None if kept is None else kept.factors.rotation


CHANGES: dict[str, Callable[[Linear], object]] = {
    "in-place": lambda made: made.loco_v["default"].mul_(0.5),
    "data swapped": lambda made: setattr(made.loco_v["default"], "data", made.loco_v["default"].data * 0.5),
    "new parameter": lambda made: made.loco_v.update({"default": nn.Parameter(made.loco_v["default"] * 0.5)}),
    "strength": lambda made: made.set_scale("default", 0.5),
    "load_state_dict": lambda made: made.load_state_dict(
        {name: value * 0.5 if "loco_v" in name else value for name, value in made.state_dict().items()}
    ),
    "load with assign": lambda made: made.load_state_dict(
        {name: value * 0.5 if "loco_v" in name else value for name, value in made.state_dict().items()},
        assign=True,
    ),
    "moved": lambda made: made.to(torch.float64),
    "adapter replaced": lambda made: made.update_layer("default", config()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_chain_is_dropped_when_something_changes(change: str) -> None:
    made = layer()
    x = torch.randn(3, IN, dtype=torch.float64)
    made(x)
    first = kept_chain(made)
    made(x)
    assert first is not None and kept_chain(made) is first
    with torch.no_grad():
        CHANGES[change](made)
        linear = made.get_base_layer()
        expected = nn.functional.linear(x, linear.weight @ dense_rotation(made), linear.bias)
        torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=0)
    assert kept_chain(made) is not first


def test_kept_chain_follows_the_activations_dtype() -> None:
    made = layer(torch.float32)
    made(torch.randn(2, IN))
    with torch.autocast("cpu", torch.bfloat16):
        made(torch.randn(2, IN))
    assert kept_chain(made)[0].dtype == torch.bfloat16


def test_training_keeps_no_chain() -> None:
    made = layer()
    x = torch.randn(3, IN, dtype=torch.float64)
    made(x)
    made.train()
    assert kept_chain(made) is None
    made(x)
    assert kept_chain(made) is None


def test_evaluation_with_gradients_keeps_no_chain() -> None:
    made = layer()
    made.loco_v.requires_grad_()
    x = torch.randn(3, IN, dtype=torch.float64)
    made(x).sum().backward()
    assert kept_chain(made) is None and made.loco_v["default"].grad.abs().max() > 0
    with torch.no_grad():
        made(x)
    assert kept_chain(made) is not None


def test_chain_kept_in_inference_mode_serves_gradients_of_the_input() -> None:
    made = layer()
    x = torch.randn(3, IN, dtype=torch.float64)
    with torch.inference_mode():
        expected = made(x)
    kept = kept_chain(made)
    x = x.clone().requires_grad_()
    out = made(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected.clone())
    assert kept_chain(made) is kept and x.grad is not None


# The configuration.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r must be a whole number above 0"),
        ({"r": 1.5}, "r must be a whole number above 0"),
        ({"num_rotations": -1}, "num_rotations must be a whole number above 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"alpha": "4"}, "alpha must be a finite number"),
        ({"map": "euler"}, "map must be one of cayley, exp"),
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
        bias="loco_only",
        exclude_modules=["b", "a"],
        modules_to_save=["h"],
    )
    made.save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LOCO" and written["exclude_modules"] == ["a", "b"]
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, LoCOConfig) and loaded == made


def test_layer_too_narrow() -> None:
    with pytest.raises(UserError, match=r"but 34 \(r = 17, num_rotations = 1\) exceeds the 32 inputs"):
        Linear(nn.Linear(IN, OUT), "default", LoCOConfig(r=17, num_rotations=1))


def test_only_linear_layers() -> None:
    with pytest.raises(UserError, match="'0' is a Conv2d"):
        get_peft_model(nn.Sequential(nn.Conv2d(64, 64, 1, groups=2)), LoCOConfig(target_modules=["0"]))


# Living in peft.


def test_get_peft_model_trains_only_the_adapter() -> None:
    model = get_peft_model(net().bfloat16(), config())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"base_model.model.{m}.loco_{f}.default" for m in ("first", "second") for f in ("u", "v")
    }
    assert model.base_model.model.first.loco_u["default"].shape == (3, IN, 2)
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


def test_training_moves_the_adapter_and_nothing_else() -> None:
    model = get_peft_model(net(), config(init_weights=True)).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(64, IN)
    target = torch.randn(64, 3)
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("loco_" in name)
    for made in (model.base_model.model.first, model.base_model.model.second):
        rotation = dense_rotation(made)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(rotation)).double())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model = get_peft_model(net(), config(modules_to_save=["head"], alpha=3.0)).eval()
    x = torch.randn(5, IN)
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(2)
        expected = model(x)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(net(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(loaded(x), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_load_in_a_fresh_process(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config(target_modules=["0"])).eval()
    x = torch.randn(5, IN)
    torch.save(
        (model.base_model.model[0].base_layer.state_dict(), x, model(x).detach()), tmp_path / "case.pt"
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    code = f"""
import sys
import loco_diffusion
heavy = [m for m in ("gradio", "controlnet_aux", "datasets", "diffusers.pipelines") if m in sys.modules]
assert not heavy, heavy
import torch
from peft import PeftModel
weights, x, expected = torch.load({str(tmp_path / "case.pt")!r})
linear = torch.nn.Linear({IN}, {OUT})
linear.load_state_dict(weights)
model = PeftModel.from_pretrained(torch.nn.Sequential(linear), {str(tmp_path / "adapter")!r}).eval()
assert torch.equal(model(x), expected)
print("equal")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "equal", result.stderr


def test_several_adapters_disable_and_delete() -> None:
    plain = net().eval()
    x = torch.randn(5, IN)
    expected = plain(x)
    model = get_peft_model(net(), config()).eval()
    model.add_adapter("other", config(r=1, target_modules=["second"]))
    one = model(x)
    model.set_adapter("other")
    other = model(x)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    outputs = [expected, one, other, both]
    assert all(not torch.allclose(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), both)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(model(x), other)
    assert list(model.base_model.model.second.scaling) == ["other"]


def test_merge_and_unload_and_merge_adapter() -> None:
    x = torch.randn(5, IN)
    model = get_peft_model(net(), config()).eval()
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():  # unmerges, as in peft
        torch.testing.assert_close(model(x), net()(x))
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, LoCOLayer) for m in merged.modules())
    torch.testing.assert_close(merged(x), expected)


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


def test_peft_converts_it_to_lora_exactly() -> None:
    model = get_peft_model(net(), config(target_modules=["first"])).eval()
    x = torch.randn(5, IN)
    lora_config, state = convert_to_lora(model, rank=12)
    lora = get_peft_model(net(), lora_config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(x), model(x), atol=1e-5, rtol=1e-4)


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


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoCOLayer)}


def test_default_targets_of_flux() -> None:
    model = flux()
    inject_adapter_in_model(flux_config(), model)
    block, single = "transformer_blocks.0.attn.", "single_transformer_blocks.0."
    double = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    attention = {block + name for name in double} | {f"{single}attn.to_{name}" for name in "qkv"}
    assert adapted(model) == attention
    model = flux()
    targets = default_target_modules("FluxTransformer2DModel", "attention+ff")
    inject_adapter_in_model(flux_config(target_modules=targets), model)
    ff = {f"transformer_blocks.0.{part}.net.{n}" for part in ("ff", "ff_context") for n in ("0.proj", "2")}
    assert adapted(model) == attention | ff | {single + "proj_mlp", single + "proj_out"}
    assert default_target_modules("Net") is None
    with pytest.raises(UserError, match="no default target_modules for Net"):
        get_peft_model(net(), LoCOConfig())


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
