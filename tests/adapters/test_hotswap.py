"""Another adapter's weights in the place of an adapter's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from method_helpers import CASES, Case, first_layer, net, pictures
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from loco_diffusion.adapters import hotswap_adapter
from loco_diffusion.errors import UserError

# Settings that leave the shapes as they are, by family.
SETTINGS: dict[str, dict[str, Any]] = {
    "loco": {"alpha": 1.0, "alpha_pattern": {"^second|mix": 3.0}, "map": "exp"},
    "loft": {"support": "coordinate"},
    "loca": {"alpha": 2.0},
}


def saved(folder: Path, case: Case, **changes: Any) -> PeftModel:
    """Another adapter, which the folder then holds."""
    base = net()
    torch.manual_seed(1)
    model = get_peft_model(base, case.config(**changes)).eval()
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize(
    ("case", "compiled"),
    [(case, False) for case in CASES] + [(Case(method, "linear"), True) for method in ("loco-both", "loft")],
    ids=str,
)
def test_hotswap(tmp_path: Path, case: Case, compiled: bool) -> None:
    model, x = case.model(), pictures()
    run = torch.compile(model, backend="eager") if compiled else model
    parameters = list(model.parameters())
    before = run(x)
    settings = SETTINGS[case.method.split("-")[0]]
    other = saved(tmp_path, case, **settings)
    hotswap_adapter(run, tmp_path)
    expected = other(x)
    torch.testing.assert_close(run(x), expected)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert {name: getattr(model.peft_config["default"], name) for name in settings} == settings


@pytest.mark.parametrize("case", [Case("loco-both", "conv2d"), Case("loca", "linear")], ids="-".join)
def test_hotswap_keeps_the_strength(tmp_path: Path, case: Case) -> None:
    model = net()
    inject_adapter_in_model(case.config(alpha=2.0), model, "style")
    layer = first_layer(model)
    layer.set_scale("style", 0.5)
    saved(tmp_path, case, alpha=6.0)
    hotswap_adapter(model, tmp_path, "style")
    assert layer.scaling == {"style": 0.5 * layer.full_scale("style")} and layer.alpha == {"style": 6.0}


def test_an_unfitted_support_can_be_swapped_for_a_fitted_one(tmp_path: Path) -> None:
    case, x = Case("loft", "linear"), pictures()
    model = case.model(support="gradient")
    other = saved(tmp_path, case)
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), other(x))


def test_refusals(tmp_path: Path) -> None:
    case = Case("loco", "linear")
    model = case.model()
    saved(tmp_path / "wider", case, r=3)
    saved(tmp_path / "conv2d", Case("loco", "conv2d"))
    saved(tmp_path / "loft", Case("loft", "linear"))
    get_peft_model(net(), LoraConfig(target_modules=["first"])).save_pretrained(str(tmp_path / "lora"))
    saved(tmp_path / "pickle", case)
    (tmp_path / "pickle" / "adapter_model.safetensors").rename(tmp_path / "pickle" / "adapter_model.bin")
    for folder, name, message in (
        ("wider", "default", "differs from the adapter 'default' in layers or shapes"),
        ("conv2d", "default", "differs from the adapter 'default' in layers or shapes"),
        ("loft", "default", "holds a LOFTConfig, the adapter 'default' is made from a LoCOConfig"),
        ("lora", "default", "holds a LoraConfig, the adapter 'default' is made from a LoCOConfig"),
        ("wider", "style", "no adapter 'style' to swap"),
        ("absent", "default", "no adapter folder"),
        ("pickle", "default", "it has no adapter_model.safetensors"),
    ):
        with pytest.raises(UserError, match=message):
            hotswap_adapter(model, tmp_path / folder, name)
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge it first"):
        hotswap_adapter(model, tmp_path / "wider")
