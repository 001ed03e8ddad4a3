"""LoCO and LOFT as LoRA: the same outputs in stock diffusers and in peft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from loco_diffusion.adapters import LoCAConfig, LoCOConfig, LOFTConfig
from loco_diffusion.adapters.export import lora_config, low_rank_svd, to_lora, truncate, write_lora_file
from loco_diffusion.errors import UserError


class Net(nn.Module):
    """Convolutions and linear layers; "linear" also ends the name of an inner layer of another rank."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 20, (3, 2), stride=2, padding=1)
        self.mix = nn.Conv2d(20, 24, 1, bias=False)
        self.block = nn.ModuleDict({"linear": nn.Linear(24, 18)})
        self.linear = nn.Linear(18, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mix(torch.tanh(self.conv(x))).flatten(2).mT
        return self.linear(torch.tanh(self.block["linear"](tokens)))


TARGETS = ["conv", "mix", "linear"]
SETTINGS: dict[str, Any] = {"init_weights": False, "target_modules": TARGETS}
METHODS = {
    "input": LoCOConfig(r=2, num_rotations=3, alpha=9.0, side="input", **SETTINGS),
    "output": LoCOConfig(r=1, num_rotations=2, alpha=4.0, map="exp", side="output", **SETTINGS),
    "both": LoCOConfig(r=2, num_rotations=2, alpha=6.0, side="both", **SETTINGS),
    "truncated chain": LoCOConfig(r=2, num_rotations=3, alpha=9.0, chain_order=1, **SETTINGS),
    "ranks": LoCOConfig(r=2, num_rotations=2, alpha=5.0, rank_pattern={"^linear": 1}, **SETTINGS),
    "loft": LOFTConfig(r=6, **SETTINGS),
    "free loft": LOFTConfig(r=5, free=True, support="random", **SETTINGS),
}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def pictures() -> Tensor:
    return torch.randn(2, 16, 9, 8, generator=torch.Generator().manual_seed(1))


def relative_error(output: Tensor, expected: Tensor) -> float:
    with torch.no_grad():
        return float((output - expected).norm() / expected.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strength", [1.0, -0.4])
def test_peft_computes_the_same_from_the_lora(method: str, strength: float) -> None:
    model = get_peft_model(net(), METHODS[method]).eval()
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", strength)
    expected, stock = model(pictures()), net()(pictures())
    assert relative_error(expected, stock) > 0.05
    state = to_lora(model)
    assert sorted(state) == sorted(
        f"{path}.lora_{part}.weight" for path in ("conv", "mix", "block.linear", "linear") for part in "AB"
    )
    lora = get_peft_model(net(), lora_config(state)).eval()
    loaded = set_peft_model_state_dict(lora, {f"base_model.model.{k}": v for k, v in state.items()})
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora" in key]
    assert {layer.scaling["default"] for layer in lora.modules() if hasattr(layer, "scaling")} == {1.0}
    assert relative_error(lora(pictures()), expected) < 1e-5


def check_in_a_pipeline(
    pipe: Any, component: str, run: Callable[[], Tensor], config: PeftConfig, folder: Path
) -> dict[str, Tensor]:
    """The same outputs from a state dict for the denoiser, and from a file for the pipeline."""
    denoiser = getattr(pipe, component)
    stock = run()
    denoiser.add_adapter(config, "mine")
    expected = run()
    assert relative_error(stock, expected) > 0.01
    state = to_lora(denoiser, "mine")
    denoiser.delete_adapters("mine")
    assert torch.equal(run(), stock)
    denoiser.load_lora_adapter(state, prefix=None, adapter_name="lora")
    assert relative_error(run(), expected) < 1e-5
    pipe.unload_lora_weights()
    assert torch.equal(run(), stock)

    write_lora_file(folder / "new" / "lora.safetensors", state, component)
    assert [path.name for path in (folder / "new").iterdir()] == ["lora.safetensors"]
    pipe.load_lora_weights(folder / "new", weight_name="lora.safetensors")
    assert relative_error(run(), expected) < 1e-5
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert relative_error(run(), expected) < 1e-5
    return state


@pytest.mark.parametrize(
    "config",
    [
        LoCOConfig(r=2, num_rotations=2, alpha=6.0, side="both", init_weights=False),
        LOFTConfig(r=6, init_weights=False),
    ],
)
def test_diffusers_computes_the_same_in_a_unet(
    stable_diffusion: StableDiffusionPipeline, config: PeftConfig, tmp_path: Path
) -> None:
    """Of linear layers and convolutions."""
    config.target_modules = ["to_q", "to_v", "ff.net.2", "conv1", "conv_shortcut", "downsamplers.0.conv"]
    generator = torch.Generator().manual_seed(1)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 3, 32)))

    def run() -> Tensor:
        with torch.no_grad():
            return stable_diffusion.unet(latents, 5, text).sample

    state = check_in_a_pipeline(stable_diffusion, "unet", run, config, tmp_path)
    assert {tensor.dim() for tensor in state.values()} == {2, 4}


@pytest.mark.parametrize(
    "config",
    [
        LoCOConfig(
            r=2, num_rotations=2, alpha=8.0, side="both", rank_pattern={"to_q": 1}, init_weights=False
        ),
        LOFTConfig(r=6, target_modules="attention+ff", init_weights=False),
    ],
)
def test_diffusers_computes_the_same_in_flux(flux: FluxPipeline, config: PeftConfig, tmp_path: Path) -> None:
    arguments = {
        "hidden_states": torch.randn(1, 4, 64),
        "encoder_hidden_states": torch.randn(1, 3, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }

    def run() -> Tensor:
        with torch.no_grad():
            return flux.transformer(**arguments).sample

    check_in_a_pipeline(flux, "transformer", run, config, tmp_path)


def test_it_is_exact_on_half_precision_weights() -> None:
    model = get_peft_model(net().bfloat16(), METHODS["both"])
    state = to_lora(model)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for path in ("mix", "linear"):
        layer = model.base_model.model.get_submodule(path)
        change = state[f"{path}.lora_B.weight"].flatten(1) @ state[f"{path}.lora_A.weight"].flatten(1)
        assert relative_error(change, layer.get_delta_weight("default").flatten(1)) < 1e-5


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 10), st.integers(0, 2**16))
def test_truncation_is_the_nearest_of_its_rank(out: int, inner: int, size: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    up, down = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((out, inner), (inner, size))
    )
    change = up @ down
    left, values, right = low_rank_svd(up, down)
    torch.testing.assert_close(left * values @ right, change)
    torch.testing.assert_close(values, torch.linalg.svdvals(change)[: len(values)])
    state, errors, error = truncate({"a.lora_A.weight": down, "a.lora_B.weight": up}, rank)
    near = state["a.lora_B.weight"] @ state["a.lora_A.weight"]
    assert len(state["a.lora_A.weight"]) == (min(rank, out, size) if rank < inner else inner)
    assert error == pytest.approx(float((change - near).norm() / change.norm()), abs=1e-7)
    tail = torch.linalg.svdvals(change)[rank:].norm() / change.norm()
    assert errors == {"a": error} and error == pytest.approx(float(tail), abs=1e-7)


def test_truncated_convolutions_keep_their_shape_and_what_matters() -> None:
    model = get_peft_model(net(), METHODS["both"]).eval()
    exact, expected = to_lora(model), model(pictures())
    outputs = []
    for rank in (2, 6, 1000):
        state, errors, error = truncate(exact, rank)
        assert max(errors.values()) >= error >= min(errors.values())
        lora = get_peft_model(net(), lora_config(state)).eval()
        set_peft_model_state_dict(lora, {f"base_model.model.{k}": v for k, v in state.items()})
        outputs.append(relative_error(lora(pictures()), expected))
        assert {len(state[name]) for name in state if "lora_A" in name} <= {rank, *map(len, exact.values())}
    assert error < 1e-6 and outputs[0] > outputs[1] > outputs[2] < 1e-5
    with pytest.raises(UserError, match="above 0, got 0"):
        truncate(exact, 0)


REFUSED: dict[str, tuple[PeftConfig, str]] = {
    "magnitude": (LoCOConfig(r=1, num_rotations=1, magnitude=True, **SETTINGS), "learned magnitudes"),
    "bias": (LoCOConfig(r=1, num_rotations=1, bias="loco_only", **SETTINGS), "biases or whole modules"),
    "modules": (
        LoCOConfig(r=1, num_rotations=1, target_modules=["mix"], modules_to_save=["linear"]),
        "biases or whole modules",
    ),
    "lora": (LoraConfig(r=1, target_modules=TARGETS), "neither LoCO nor LOFT"),
    "loca": (LoCAConfig(num_coefficients=8, target_modules=TARGETS), "neither LoCO nor LOFT"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_lora_holds_is_refused(case: str) -> None:
    config, message = REFUSED[case]
    with pytest.raises(UserError, match=message):
        to_lora(get_peft_model(net(), config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 3, "dilation": 2}, "0 is a dilated convolution"),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, "with circular padding"),
        ({"kernel_size": (1, 3), "padding": "same", "padding_mode": "reflect"}, "with reflect padding"),
        ({"kernel_size": 1, "padding": 2, "padding_mode": "replicate"}, "with replicate padding"),
        ({"kernel_size": 1, "padding": 1, "dilation": 2}, None),
        ({"kernel_size": 3, "padding": "same", "padding_mode": "zeros"}, None),
        ({"kernel_size": 3, "padding_mode": "circular"}, None),
        ({"kernel_size": 1, "padding": "same", "padding_mode": "reflect"}, None),
    ],
)
def test_convolutions_are_followed_or_refused(settings: dict[str, Any], message: str | None) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(8, 6, **settings))
    stock, x = copy.deepcopy(base), torch.randn(1, 8, 5, 5)
    config = LoCOConfig(r=1, num_rotations=2, side="both", init_weights=False, target_modules=["0"])
    model = get_peft_model(base, config).eval()
    if message:
        with pytest.raises(UserError, match=message):
            to_lora(model)
        return
    state = to_lora(model)
    lora = get_peft_model(stock, lora_config(state)).eval()
    set_peft_model_state_dict(lora, {f"base_model.model.{k}": v for k, v in state.items()})
    assert relative_error(lora(x), model(x)) < 1e-5


def test_what_is_not_there_or_merged_is_refused() -> None:
    with pytest.raises(UserError, match="no adapter 'default'"):
        to_lora(net())
    model = get_peft_model(net(), METHODS["input"])
    with pytest.raises(UserError, match="no adapter 'other'"):
        to_lora(model, "other")
    model.merge_adapter()
    with pytest.raises(UserError, match="unmerge them first"):
        to_lora(model)
