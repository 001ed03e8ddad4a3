"""LoCO adapters made from others: weighted sums and products, hot swap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loco_helpers import IN, config, net
from peft import LoraConfig, PeftModel, get_peft_model

from loco_diffusion.adapters import LoCOLayer, hotswap_adapter
from loco_diffusion.errors import UserError

# Several adapters as one.


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_composed_adapter_does_what_the_adapters_do_together(side: str) -> None:
    model = get_peft_model(net(), config(side=side, alpha=1.0)).eval()
    model.add_adapter("other", config(side=side, r=1, num_rotations=2, rank_pattern={"second": 2}))
    x = torch.randn(5, IN)
    model.base_model.set_adapter(["default", "other"])
    for module in model.modules():
        if isinstance(module, LoCOLayer):
            module.set_scale("other", -0.5)
    expected = model(x)
    model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "both", combination_type="compose")
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".both"))
    model.set_adapter("both")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_weighted_sum_of_generators() -> None:
    model = get_peft_model(net(), config(magnitude=True)).eval()
    x = torch.randn(5, IN)
    for module in model.modules():
        if isinstance(module, LoCOLayer):
            module.set_scale("default", 0.25)
    expected = model(x)
    model.add_weighted_adapter(["default", "default"], [0.75, -0.5], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "style"], [1.0, 1.0], "new"), "takes existing adapters"),
        ((["default"], [1.0, 1.0], "new"), "a weight for each"),
        ((["default"], [1.0], "default"), "a new name"),
        ((["default"], [1.0], "new", "svd"), "combination_type must be one of compose, lie"),
    ],
)
def test_bad_combinations_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    model = get_peft_model(net(), config())
    with pytest.raises(UserError, match=message):
        model.add_weighted_adapter(*arguments)


# Hot swap.


def saved(folder: Path, **changes: Any) -> PeftModel:
    """Another adapter, which the folder then holds."""
    torch.manual_seed(1)
    model = get_peft_model(net(), config(**changes)).eval()
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("compiled", [False, True])
def test_hotswap(tmp_path: Path, compiled: bool) -> None:
    model = get_peft_model(net(), config()).eval()
    run = torch.compile(model, backend="eager") if compiled else model
    x = torch.randn(5, IN)
    parameters = list(model.parameters())
    before = run(x)
    other = saved(tmp_path, alpha=1.0, alpha_pattern={"^second": 3.0}, map="exp")
    hotswap_adapter(run, tmp_path)
    expected = other(x)
    torch.testing.assert_close(run(x), expected)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.peft_config["default"].alpha == 1.0


def test_hotswap_keeps_the_strength(tmp_path: Path) -> None:
    model = get_peft_model(net(), config()).eval()
    layer = model.base_model.model.first
    layer.set_scale("default", 0.5)
    saved(tmp_path, alpha=6.0)
    hotswap_adapter(model, tmp_path)
    assert layer.scaling == {"default": 1.5}


def test_hotswap_refusals(tmp_path: Path) -> None:
    model = get_peft_model(net(), config()).eval()
    saved(tmp_path / "wider", r=3)
    get_peft_model(net(), LoraConfig(target_modules=["first"])).save_pretrained(str(tmp_path / "lora"))
    saved(tmp_path / "pickle")
    (tmp_path / "pickle" / "adapter_model.safetensors").rename(tmp_path / "pickle" / "adapter_model.bin")
    for folder, name, message in (
        ("wider", "default", "differs from the adapter 'default' in layers or shapes"),
        ("lora", "default", "holds a LoraConfig: only LoCO adapters"),
        ("wider", "style", "no LoCO adapter 'style' to swap"),
        ("absent", "default", "no adapter folder"),
        ("pickle", "default", "it has no adapter_model.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            hotswap_adapter(model, tmp_path / folder, name)
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge it first"):
        hotswap_adapter(model, tmp_path / "wider")
