"""What peft's users expect of any method, for all of ours, on linear layers and convolutions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from loco_diffusion.adapters import LoCAConfig, LoCOConfig, LOFTConfig
from loco_diffusion.adapters.config import AdapterConfig
from loco_diffusion.errors import UserError

METHODS: dict[str, Callable[..., AdapterConfig]] = {
    "loco": lambda **settings: LoCOConfig(**{"r": 2, "num_rotations": 3, **settings}),
    "loco-output": lambda **settings: LoCOConfig(
        **{"r": 2, "num_rotations": 2, "side": "output", "map": "exp", **settings}
    ),
    "loco-both": lambda **settings: LoCOConfig(
        **{"r": 3, "num_rotations": 2, "side": "both", "magnitude": True, **settings}
    ),
    "loft": lambda **settings: LOFTConfig(**{"r": 12, **settings}),
    "loft-free": lambda **settings: LOFTConfig(**{"r": 5, "free": True, "support": "random", **settings}),
    "loca": lambda **settings: LoCAConfig(**{"num_coefficients": 90, **settings}),
}
TARGETS = {"linear": ["first", "second"], "conv2d": ["conv", "mix"]}


class Net(nn.Module):
    """Two convolutions, two linear layers, and a head that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 32, 3, stride=2, dilation=2, padding=2)
        self.mix = nn.Conv2d(32, 24, 1, bias=False)
        self.first = nn.Linear(24, 32)
        self.second = nn.Linear(32, 24, bias=False)
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mix(torch.tanh(self.conv(x))).flatten(2).mT
        return self.head(self.second(torch.tanh(self.first(tokens))).mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def pictures(count: int = 4) -> Tensor:
    return torch.randn(count, 24, 6, 5, generator=torch.Generator().manual_seed(1))


class Case(NamedTuple):
    """A method on one kind of layer."""

    method: str
    kind: str

    def config(self, **settings: Any) -> AdapterConfig:
        defaults = {"target_modules": TARGETS[self.kind], "init_weights": False}
        return METHODS[self.method](**{**defaults, **settings})

    def model(self, **settings: Any) -> PeftModel:
        """An evaluated model with an adapter that changes it noticeably."""
        return get_peft_model(net(), self.config(**settings)).eval()


CASES = [Case(method, kind) for method in METHODS for kind in TARGETS]


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


def differ(*outputs: Tensor) -> bool:
    return all((a - b).abs().max() > 1e-4 for i, a in enumerate(outputs) for b in outputs[:i])


def adapter_names(model: nn.Module) -> set[str]:
    """The names of the parameters that belong to adapters."""
    return {
        name
        for name, _ in model.named_parameters()
        if any(f".{p}_" in name for p in ("loco", "loft", "loca"))
    }


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_weight_path_equals_activation_path(case: Case, dtype: torch.dtype) -> None:
    model = case.model().to(dtype)
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    name = TARGETS[case.kind][0]
    layer = model.base_model.model.get_submodule(name)
    generator = torch.Generator().manual_seed(1)
    shape = (2, 7, 24) if case.kind == "linear" else (2, 24, 6, 5)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight, adapted = layer.get_base_layer().weight.clone(), layer(x)
    delta = layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(layer(x), adapted, atol=tolerance, rtol=tolerance)
    change = layer.get_base_layer().weight.double() - weight.double()
    torch.testing.assert_close(change, delta.double(), atol=tolerance, rtol=0)
    assert change.norm() > 0.01 * weight.double().norm()
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight, weight, atol=tolerance, rtol=0)


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


def test_an_adapter_for_each_row(case: Case) -> None:
    model, x = case.model(), pictures()
    model.add_adapter("other", case.config())
    outputs = {"__base__": net()(x), "default": model(x)}
    model.set_adapter("other")
    outputs["other"] = model(x)
    names = ["other", "__base__", "default", "other"]
    mixed = model(x, adapter_names=names)
    assert_close(mixed, torch.stack([outputs[name][row] for row, name in enumerate(names)]))
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


@pytest.mark.parametrize("method", ["loco", "loft", "loca"])
def test_a_target_that_does_not_exist(method: str) -> None:
    with pytest.raises(UserError, match="found nothing to adapt in Net"):
        get_peft_model(net(), METHODS[method](target_modules=["third"]))


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
