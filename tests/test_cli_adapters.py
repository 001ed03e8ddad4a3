"""What the command line makes of adapters and tells about them: info, export, merge."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from peft import PeftConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from loco_diffusion import Controller, rotations
from loco_diffusion.adapters import LoCAConfig, LoCOConfig, LOFTConfig, peft_folder
from loco_diffusion.adapters.export import to_lora
from loco_diffusion.adapters.inspection import rotations_of
from loco_diffusion.cli import main
from loco_diffusion.conditions import get_condition
from loco_diffusion.control import adapter_folder, layers
from loco_diffusion.images import fit

Failure = Callable[..., str]
pytestmark = pytest.mark.usefixtures("workplace")


def test_info_shows_what_is_in_an_adapter(adapters: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(adapters / "canny"), "--plot", "angles.png"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    for words in ("loco", "canny", "FluxTransformer2DModel", "num_rotations 2", "pixels, 8 wide", "MB"):
        assert words in captured.out
    for words in ("trainable in 11 layers", "to_add_out", "orthogonality", "e-0", "attn.to_q", "█", "°"):
        assert words in captured.out
    assert "intruders" not in captured.out and captured.out.endswith("\nWrote angles.png\n")
    assert Image.open("angles.png").width > 1000


def test_exports_a_lora_that_controls_the_same_way(
    photo: Path, adapters: Path, flux_folder: Path, capfd: pytest.CaptureFixture[str], failure: Failure
) -> None:
    export = ["export", str(adapters / "canny"), "--model", str(flux_folder)]
    assert main([*export, "--out", "lora/canny"]) == 0
    assert capfd.readouterr().out == "Wrote lora/canny (rank 8, exact)\n"
    assert main([*export, "--out", "small", "--rank", "1"]) == 0
    assert "rank 1, relative error 0." in capfd.readouterr().out
    base = FluxPipeline.from_pretrained(flux_folder)
    controller = Controller(base)
    features = []
    for name, folder in {"loco": adapters / "canny", "lora": "lora/canny", "small": "small"}.items():
        controller.load_adapter(folder, name)
        with controller({name: photo_map(photo)}):
            features.append(denoised(base))
    assert (
        relative_difference(features[1], features[0]) < 1e-5 < relative_difference(features[2], features[0])
    )

    capfd.readouterr()
    assert main(["info", "lora/canny", "--model", str(flux_folder), "--plot", "values.png"]) == 0
    shown = capfd.readouterr()
    assert shown.err == "" and re.search(r"settings +r 8 *\n", shown.out)  # lora_alpha is peft's default, 8
    assert "of 110 leading singular vectors" in shown.out and "largest singular value" in shown.out
    assert "exists" in failure(*export, "--out", "small")


def test_exports_a_file_for_stock_diffusers(
    adapters: Path, flux_folder: Path, capfd: pytest.CaptureFixture[str], failure: Failure
) -> None:
    export = ["export", str(adapters / "canny"), "--model", str(flux_folder), "--out", "lora.safetensors"]
    assert main(export) == 0
    captured = capfd.readouterr()
    assert (
        captured.out == "Wrote lora.safetensors (rank 8, exact)\n" and "no condition encoder" in captured.err
    )
    base = FluxPipeline.from_pretrained(flux_folder)
    stock = denoised(base)
    content = adapter_folder.read(adapters / "canny")  # without a controller, which would keep it off
    layers.inject(base.transformer, content.method, "canny")
    layers.set_weights(base.transformer, "canny", content.adapter)
    with layers.activated(base.transformer, {"canny": 1.0}):
        expected = denoised(base)
    layers.remove(base.transformer, "canny")
    base.load_lora_weights(".", weight_name="lora.safetensors")
    assert relative_difference(denoised(base), expected) < 1e-5 < relative_difference(stock, expected)
    assert "lora.safetensors exists" in failure(*export)


def test_merges_adapters_of_one_condition(
    adapters: Path, flux_folder: Path, photo: Path, capfd: pytest.CaptureFixture[str], failure: Failure
) -> None:
    canny, other = adapters / "canny", Path("other")
    shutil.copytree(adapters / "deblur", other)
    config = json.loads((other / "control_config.json").read_text())
    (other / "control_config.json").write_text(json.dumps(config | {"condition": "canny"}))
    for method in ("compose", "lie"):
        command = [
            "merge",
            str(canny),
            str(other),
            "--method",
            method,
            "--weights",
            "1,-0.5",
            "--out",
            method,
        ]
        assert main(command) == 0
        assert capfd.readouterr().out == f"Wrote {method}\n"
        assert main(["info", method]) == 0
        shape = {"compose": "r 1, num_rotations 4", "lie": "r 2, num_rotations 2"}[method]
        shown = capfd.readouterr().out
        assert shape in shown and "pixels, 16 wide" in shown
    base = FluxPipeline.from_pretrained(flux_folder)
    controller = Controller(base)
    for name, folder in {"one": canny, "two": other, "both": Path("compose")}.items():
        controller.load_adapter(folder, name)
    picture = photo_map(photo)
    with controller(one=picture, two=picture, strength={"one": 1.0, "two": -0.5}):
        expected = denoised(base)
    with controller(both=picture):
        assert relative_difference(denoised(base), expected) < 1e-4

    assert "exists" in failure("merge", canny, other, "--out", "lie")
    assert "different conditions" in failure("merge", canny, adapters / "deblur", "--out", "new")
    assert "two or more" in failure("merge", canny, "--out", "new")
    for weights in ("1", "1,x", "1,nan"):
        assert "2 finite numbers" in failure("merge", canny, other, "--weights", weights, "--out", "new")
    assert "no adapter folder" in failure("merge", canny, "missing", "--out", "new")


def test_adapters_of_peft_have_no_encoder(
    adapters: Path, flux_folder: Path, capfd: pytest.CaptureFixture[str], failure: Failure
) -> None:
    """Their folders can be exported, merged and inspected as well."""
    plain = Path("plain")
    shutil.copytree(adapters / "canny", plain, ignore=shutil.ignore_patterns("control_*"))
    for name in ("a", "b"):
        assert main(["merge", str(plain), str(plain), "--method", "lie", "--out", name]) == 0
    command = ["export", "a", "--model", str(flux_folder), "--out"]
    assert main([*command, "lora"]) == main([*command, "lora.safetensors"]) == 0
    capfd.readouterr()
    assert sorted(path.name for path in Path("lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert main(["info", "lora", "--model", str(flux_folder)]) == 0
    shown = capfd.readouterr()
    assert shown.err == "" and "condition" not in shown.out and "intruders" in shown.out
    assert "does not fit the base model" in failure("export", "a", "--out", "new")
    assert "Only some" in failure("merge", "a", adapters / "canny", "--out", "new")
    assert "no adapter folder" in failure("info", ".")


def photo_map(photo: Path) -> Image.Image:
    """The photo's edges, 32 px wide and high."""
    return get_condition("canny").extract(fit(Image.open(photo), 32, 32))


def denoised(pipe: FluxPipeline) -> torch.Tensor:
    """Two denoising steps in float32, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        "a red cube",
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=12,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


def save_plain(folder: str, config: PeftConfig, model: nn.Module | None = None, width: int = 16) -> PeftModel:
    """Save an adapter as peft does, of a model or else of one layer of this width."""
    torch.manual_seed(0)
    model = get_peft_model(model or nn.Sequential(nn.Linear(width, width)), config)
    model.save_pretrained(folder)
    return model


def rotations_in(folder: str) -> dict[str, torch.Tensor]:
    content = peft_folder.read(Path(folder))
    return {
        name: rotations.dense(basis, core)
        for name, basis, core in rotations_of(content.method, content.adapter)
    }


def test_merges_loft_adapters(
    make_flux: Callable[..., FluxPipeline], capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"target_modules": ["to_q", "to_out.0"], "support": "random", "init_weights": False}
    for number, name in enumerate("ab"):
        config = LOFTConfig(r=4 + number, rank_pattern={"to_q": 6}, **settings)
        save_plain(name, config, make_flux().transformer)
    assert main(["merge", "a", "b", "--out", "both"]) == 0
    first, second, both = (rotations_in(name) for name in ("a", "b", "both"))
    assert len(both) == 3
    for name, merged in both.items():
        torch.testing.assert_close(merged, first[name] @ second[name], atol=1e-5, rtol=0)
    assert main(["merge", "a", "a", "--method", "lie", "--weights", "0.25,0.75", "--out", "same"]) == 0
    for name, merged in rotations_in("same").items():
        torch.testing.assert_close(merged, first[name], atol=1e-5, rtol=0)
    capfd.readouterr()
    assert main(["info", "both"]) == 0
    assert "r 12, support gradient" in capfd.readouterr().out


def test_what_one_adapter_cannot_hold_is_not_merged(failure: Failure) -> None:
    one = {"target_modules": ["0"]}
    save_plain("../loco", LoCOConfig(r=1, num_rotations=2, **one))
    save_plain("../wide", LoCOConfig(r=1, num_rotations=2, **one), width=24)
    save_plain("../loft", LOFTConfig(r=4, **one))
    save_plain("../free", LOFTConfig(r=4, free=True, **one))
    save_plain("../loca", LoCAConfig(num_coefficients=4, **one))
    for names, words in {
        ("loco", "loft"): "these are LOFT and LoCO",
        ("loca", "loca"): "these are LoCA",
        ("loft", "free"): "Free LOFT adapters",
        ("loco", "loco", "wide"): "in their order, 0 has 16, 16, 24 inputs",
    }.items():
        assert words in failure("merge", *(f"../{name}" for name in names), "--out", "new")


def test_a_unet_is_loaded_without_the_rest_of_its_pipeline(
    stable_diffusion: StableDiffusionPipeline,
    adapters: Path,
    capfd: pytest.CaptureFixture[str],
    failure: Failure,
) -> None:
    stable_diffusion.save_pretrained("model")
    targets = ["to_q", "conv1", "downsamplers.0.conv"]
    config = LoCOConfig(r=2, num_rotations=2, side="both", init_weights=False, target_modules=targets)
    model = save_plain("turn", config, stable_diffusion.unet)
    for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
        shutil.rmtree(f"model/{part}")
    assert main(["export", "turn", "--model", "model", "--out", "lora.safetensors"]) == 0
    exported = load_file("lora.safetensors")
    assert {tensor.ndim for tensor in exported.values()} == {2, 4}
    expected = {f"unet.{name}": tensor for name, tensor in to_lora(model).items()}
    torch.testing.assert_close(exported, expected)
    assert main(["info", "turn", "--model", "model"]) == 0
    assert f"of {5 * len(exported)} leading singular vectors" in capfd.readouterr().out
    assert "this pipeline has a UNet2DConditionModel" in failure(
        "export", adapters / "canny", "--model", "model", "--out", "new"
    )
    shutil.rmtree("model/unet")
    assert "cannot be loaded" in failure("export", "turn", "--model", "model", "--out", "new")
    index = json.loads(Path("model/model_index.json").read_text())
    del index["unet"]
    Path("model/model_index.json").write_text(json.dumps(index))
    assert "neither a transformer nor a unet" in failure("export", "turn", "--model", "model", "--out", "new")


def test_an_adapter_of_another_base_is_not_exported(
    adapters: Path, flux_folder: Path, failure: Failure
) -> None:
    shutil.copytree(adapters / "canny", "other")
    config = json.loads(Path("other/control_config.json").read_text())
    config["base"]["config"]["num_layers"] = 19
    Path("other/control_config.json").write_text(json.dumps(config))
    assert "num_layers 19" in failure("export", "other", "--model", flux_folder, "--out", "new")


@pytest.mark.parametrize("method", ["loft", "loca"])
def test_info_knows_every_method(method: str, capfd: pytest.CaptureFixture[str], failure: Failure) -> None:
    configs = {
        "loft": LOFTConfig(r=4, support="random", init_weights=False, target_modules=["0"]),
        "loca": LoCAConfig(num_coefficients=5, target_modules=["0"]),
    }
    save_plain("turn", configs[method])
    assert main(["info", "turn"]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    words = {
        "loft": ["loft", "r 4, support random", "6 trainable in 1 layers", "‖R Rᵀ - I‖ at most", "°"],
        "loca": ["loca", "num_coefficients 5", "15 trainable in 1 layers"],
    }
    for expected in words[method]:
        assert expected in shown.out
    layer = shown.out.splitlines()[-1].split()
    if method == "loft":
        assert layer[0] == "0" and 0 < float(layer[-1]) < 1e-5
        assert main(["info", "turn", "--plot", "angles.png"]) == 0
    else:
        assert "°" not in shown.out and "I‖" not in shown.out
        assert "nothing to plot of a LOCA adapter" in failure("info", "turn", "--plot", "angles.png")
