"""What peft's users expect of any method, for all of ours, on linear layers and convolutions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from method_helpers import (
    CASES,
    METHODS,
    TARGETS,
    Case,
    adapter_names,
    assert_close,
    net,
    pictures,
)
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from loco_diffusion.errors import UserError


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def differ(*outputs: Tensor) -> bool:
    return all((a - b).abs().max() > 1e-4 for i, a in enumerate(outputs) for b in outputs[:i])


def test_starts_at_the_identity_and_trains_the_adapter_alone(case: Case) -> None:
    model = case.model(init_weights=True)
    x, target = pictures(), torch.eye(4, 3)
    assert torch.equal(model(x), net()(x))
    names = adapter_names(model)
    assert names and {name for name, p in model.named_parameters() if p.requires_grad} == names
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    model.train()
    losses = []
    for _ in range(8):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == names


def test_merged_equals_unmerged_and_unmerging_restores(case: Case) -> None:
    model, x = case.model(), pictures()
    base, adapted = net()(x), model(x)
    assert differ(base, adapted)
    with model.disable_adapter():
        assert torch.equal(model(x), base)
    model.merge_adapter(safe_merge=True)
    assert_close(model(x), adapted)
    with model.disable_adapter():
        assert_close(model(x), base)
    assert_close(model(x), adapted)  # unmerged
    merged = model.merge_and_unload()
    assert not adapter_names(merged) and merged.state_dict().keys() == net().state_dict().keys()
    assert_close(merged(x), adapted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weight_path_equals_activation_path(case: Case, dtype: torch.dtype) -> None:
    layer, x = case.layer().to(dtype), case.inputs(dtype)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 0.03}[dtype]
    weight, adapted = layer.get_base_layer().weight.clone(), layer(x)
    delta = layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(layer(x), adapted, atol=tolerance, rtol=tolerance)
    change = layer.get_base_layer().weight.double() - weight.double()
    torch.testing.assert_close(change, delta.double(), atol=tolerance, rtol=0)
    assert change.norm() > 0.01 * weight.double().norm()
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight, weight, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_merging_in_half_precision_rounds_once(case: Case, dtype: torch.dtype, digits: int) -> None:
    layer = case.layer()
    weight = layer.get_base_layer().to(dtype).weight.float()
    exact = weight + layer.get_delta_weight("default")
    layer.merge()
    merged = layer.get_base_layer().weight
    assert merged.dtype == dtype
    assert ((merged.float() - exact).abs() - 2.0**-digits * exact.abs()).max() < 1e-6
    layer.unmerge()
    difference = layer.get_base_layer().weight.float() - weight
    if case.method not in ("loco-both", "loft-free"):  # they change lengths
        assert difference.norm() < 2.0 ** (1 - digits) * weight.norm()


def test_several_adapters(case: Case) -> None:
    model, x = case.model(), pictures()
    model.add_adapter("other", case.config(target_modules=TARGETS[case.kind][:1]))
    base, one = net()(x), model(x)
    model.set_adapter("other")
    other = model(x)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    assert differ(base, one, other, both)
    model.merge_adapter()
    assert_close(model(x), both)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert_close(model(x), other)
    assert not any(".default" in name for name in model.state_dict())


@pytest.mark.parametrize("modules_to_save", [None, ["head"]])
def test_an_adapter_for_each_row(case: Case, modules_to_save: list[str] | None) -> None:
    model, x = case.model(modules_to_save=modules_to_save), pictures()
    model.add_adapter("other", case.config(modules_to_save=modules_to_save))
    if modules_to_save:
        for factor, head in enumerate(model.base_model.model.head.modules_to_save.values(), 2):
            head.weight.data *= factor
    outputs = {"__base__": net()(x), "default": model(x)}
    model.set_adapter("other")
    outputs["other"] = model(x)
    names = ["other", "__base__", "default", "other"]
    mixed = model(x, adapter_names=names)
    assert_close(mixed, torch.stack([outputs[name][row] for row, name in enumerate(names)]))
    assert differ(*outputs.values())
    assert torch.equal(model(x), outputs["other"])


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_with_a_module_to_save(case: Case, tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    model, x = case.model(modules_to_save=["head"]), pictures()
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.mul_(2)
    expected = model(x)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(net(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert_close(loaded(x), expected)
    states = get_peft_model_state_dict(loaded), get_peft_model_state_dict(model)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(net(), str(tmp_path), is_trainable=True)
    head = {f"base_model.model.head.modules_to_save.default.{name}" for name in ("weight", "bias")}
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == adapter_names(trainable) | head


@pytest.fixture(scope="module")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one new process says about every case, loaded from disk: the imports are the slow part."""
    folder = tmp_path_factory.mktemp("cases")
    for case in CASES:
        base = net().get_submodule(TARGETS[case.kind][0])
        weights, x = base.state_dict(), pictures() if case.kind == "conv2d" else torch.randn(4, 24)
        model = get_peft_model(nn.Sequential(base), case.config(target_modules=["0"])).eval()
        model.save_pretrained(str(folder / "-".join(case)))
        torch.save((weights, x, model(x).detach()), folder / f"{'-'.join(case)}.pt")
    code = """
import sys
from pathlib import Path
import loco_diffusion
from peft import PeftModel
import torch
from torch import nn
for file in sorted(Path(sys.argv[1]).glob("*.pt")):
    weights, x, expected = torch.load(file)
    conv2d = file.stem.endswith("conv2d")
    base = nn.Conv2d(24, 32, 3, stride=2, dilation=2, padding=2) if conv2d else nn.Linear(24, 32)
    base.load_state_dict(weights)
    model = PeftModel.from_pretrained(nn.Sequential(base), str(file.with_suffix(""))).eval()
    print(file.stem, torch.allclose(model(x), expected, atol=1e-6))
"""
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_load_in_a_fresh_process(case: Case, fresh_process: str) -> None:
    assert f"{'-'.join(case)} True" in fresh_process.splitlines()


def test_safe_merge_refuses_broken_weights_and_changes_nothing(case: Case) -> None:
    model = case.model()
    with torch.no_grad():
        first = next(p for name, p in model.named_parameters() if name in adapter_names(model))
        first[(0,) * first.dim()] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(model(pictures()), net()(pictures()))


# Quantised base layers.

INT8 = Int8WeightOnlyConfig()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("can_requantise", [False, True])
def test_torchao_int8_weights(method: str, can_requantise: bool) -> None:
    case = Case(method, "linear")
    made, x = case.layer(), case.inputs()
    quantised = nn.Sequential(net().first)
    quantize_(quantised, INT8)
    kwargs = {"get_apply_tensor_subclass": lambda: INT8} if can_requantise else {}
    on_int8 = type(made)(quantised[0], "default", case.config(), kwargs)
    on_int8.load_state_dict({**made.state_dict(), "base_layer.weight": quantised[0].weight})
    made.get_base_layer().weight.data = quantised[0].weight.dequantize()
    expected = made(x)
    torch.testing.assert_close(on_int8(x), expected, atol=1e-4, rtol=1e-4)
    on_int8.train()(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in on_int8.parameters() if p.requires_grad)
    on_int8.eval()
    if can_requantise:
        on_int8.merge()
        torch.testing.assert_close(on_int8(x), expected, atol=0.05, rtol=0.05)
    else:
        with pytest.raises(UserError, match="without quantisation"):
            on_int8.merge()


@pytest.mark.parametrize("method", METHODS)
def test_load_onto_a_quantised_base(method: str, tmp_path: Path) -> None:
    case, x = Case(method, "linear"), pictures()
    quantised, rounded = net(), net()
    quantize_(quantised, INT8)
    for layer, other in zip(quantised.children(), rounded.children(), strict=True):
        if isinstance(layer, nn.Linear):
            other.weight.data = layer.weight.dequantize()
    torch.manual_seed(1)
    model = get_peft_model(rounded, case.config()).eval()
    expected, state = model(x), get_peft_model_state_dict(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(quantised, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(x), expected, atol=1e-4, rtol=1e-4)
    loaded.add_adapter("other", case.config())
    set_peft_model_state_dict(loaded, state, adapter_name="other")
    loaded.set_adapter("other")
    torch.testing.assert_close(loaded(x), expected, atol=1e-4, rtol=1e-4)


# Other models than denoisers.


def language_model() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny Llama, and a text for it to learn."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    tokens = torch.randint(16, (2, 12))
    return LlamaForCausalLM(config), {"input_ids": tokens, "labels": tokens}


def vision_transformer() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny ViT, and pictures for it to tell apart."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_labels=12,
        initializer_range=0.2,
    )
    return ViTForImageClassification(config), {
        "pixel_values": torch.randn(6, 3, 16, 16),
        "labels": torch.arange(6) % 3,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [language_model, vision_transformer])
def test_learning_in_transformers(
    method: str, build: Callable[[], tuple[nn.Module, dict[str, Tensor]]]
) -> None:
    model, batch = build()
    model = get_peft_model(model, METHODS[method](target_modules="all-linear")).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    expected = model(**batch).logits
    torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected, atol=1e-4, rtol=1e-4)
