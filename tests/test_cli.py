"""The command line on a tiny FLUX: what it writes, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from loco_diffusion.cli import main
from loco_diffusion.conditions import get_condition
from loco_diffusion.generation import Sampling, open_session
from loco_diffusion.images import fit

SIZE = ["--width", "32", "--height", "32", "--steps", "2"]
Failure = Callable[..., str]
pytestmark = pytest.mark.usefixtures("workplace")


@pytest.fixture
def tiny(flux_folder: Path) -> list[str]:
    """Arguments for a picture of the tiny model."""
    return ["generate", "--prompt", "a red cube", "--model", str(flux_folder), *SIZE]


@pytest.fixture
def controlled(tiny: list[str], adapters: Path, photo: Path) -> list[str]:
    """Arguments for a picture of the tiny model that follows the photo's edges."""
    return [*tiny, "--adapter", f"canny={adapters / 'canny'}", "--control", f"canny={photo}"]


def test_draws_what_the_library_draws(
    controlled: list[str],
    photo: Path,
    adapters: Path,
    flux_folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    more = [f"--control-image=deblur={photo}", "--adapter", f"deblur={adapters / 'deblur'}", "--seed", "3"]
    assert main([*controlled, *more, "--strength", "canny=0.5"]) == 0
    captured = capfd.readouterr()
    assert captured.err == "" and captured.out == "Wrote out.png (32x32 px)\n"

    session = open_session(flux_folder)
    session.load_adapters({"canny": adapters / "canny", "deblur": adapters / "deblur"})
    original = fit(Image.open(photo), 32, 32)
    maps = {"canny": get_condition("canny").extract(original), "deblur": original}
    sampling = Sampling(32, 32, steps=2, guidance=1.0)
    arguments = {"maps": maps, "strength": {"canny": 0.5, "deblur": 1.0}}
    picture = session.generate(["a red cube"], [3], sampling, **arguments)[0]
    drawn, free = Image.open("out.png"), session.generate(["a red cube"], [3], sampling)[0]
    assert drawn.mode == "RGB" and drawn.tobytes() != free.tobytes()
    # The ready map was cropped, then resized by another filter than a picture's.
    assert _difference(drawn, picture) < _difference(drawn, free)


def test_a_picture_does_not_depend_on_its_batch(flux_folder: Path) -> None:
    session = open_session(flux_folder)
    sampling = Sampling(32, 48, steps=2, guidance=2.0)
    both = session.generate(["a cube", ""], [1, 2], sampling)
    single = session.generate([""], [2], sampling)
    assert both[1].size == (32, 48)
    assert _difference(both[1], single[0]) < 2  # bfloat16
    assert _difference(both[0], both[1]) > 2


def test_without_control_it_draws_from_the_prompt(tiny: list[str]) -> None:
    assert main([*tiny, "--out", "a.jpg"]) == 0
    assert Image.open("a.jpg").size == (32, 32)


def test_odd_sizes_are_noted(tiny: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*tiny, "--width", "41", "--height", "30"]) == 0
    captured = capfd.readouterr()
    assert "(48x32 px)" in captured.out
    notes = captured.err.splitlines()
    assert len(notes) == 1 and "multiples of 16" in notes[0]


def test_a_prompt_that_the_model_would_not_read_to_its_end_is_refused(
    tiny: list[str], failure: Failure
) -> None:
    assert "shorten it" in failure(*tiny, "--prompt", "cube " * 50)
    assert not Path("out.png").exists()


def test_a_process_writes_the_picture_and_nothing_else(controlled: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["TORCH_LOGS"] = "-all"  # torch reports what torchao, which the tests install, does on import
    command = [sys.executable, "-m", "loco_diffusion.cli", *controlled]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path("out.png").is_file()


def test_it_overwrites_only_when_told(tiny: list[str], failure: Failure) -> None:
    Path("out.png").write_bytes(b"mine")
    assert "--overwrite" in failure(*tiny)
    assert Path("out.png").read_bytes() == b"mine"
    assert main([*tiny, "--overwrite"]) == 0
    assert Image.open("out.png").size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--control", "canny"], "CONDITION=VALUE"),
        (["--control", "pose=a.png"], "no condition 'pose'"),
        (["--control", "canny=a.png", "--control", "canny=b.png"], "twice"),
        (["--control", "canny=a.png", "--control-image", "canny=b.png"], "both"),
        (["--control", "canny=a.png"], "a.png does not exist"),
        (["--strength", "canny=1"], "not controlled"),
        (["--control", "canny=a.png", "--strength", "canny=strong"], "finite number"),
        (["--control", "canny=a.png", "--strength", "canny=nan"], "finite number"),
        (["--control", "canny=a.png", "--model", "some/model"], "--adapter canny="),
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "\udcff"], "UTF-8"),
        (["--model", "no/such/folder"], "no model folder"),
        (["--model", "."], "model_index.json"),
        (["--out", "no/out.png"], "does not exist"),
        (["--out", "."], "is a folder"),
        (["--out", "out.doc"], "known picture extension"),
        (["--steps", "0"], "--steps"),
        (["--seed", "-1"], "--seed"),
        (["--speed", "1"], "--speed"),
    ],
)
def test_wrong_arguments(arguments: list[str], words: str, failure: Failure) -> None:
    assert words in failure("generate", "--prompt", "a cube", *arguments)


def test_wrong_usage(failure: Failure) -> None:
    assert "--prompt" in failure("generate")
    assert "draw" in failure("draw")
    assert "missing.yaml" in failure("train", "missing.yaml")
    assert "no adapter folder" in failure("info", "missing")


@pytest.mark.parametrize("content", [b"", b"text", b"truncated", b"tiny"])
def test_bad_pictures(content: bytes, photo: Path, tmp_path: Path, failure: Failure) -> None:
    path = tmp_path / "bad.png"
    if content == b"tiny":
        Image.new("RGB", (1, 1)).save(path)
    else:
        path.write_bytes(photo.read_bytes()[:200] if content == b"truncated" else content)
    assert "bad.png" in failure("generate", "--prompt", "a cube", "--control", f"canny={path}")
    assert "bad.png" in failure("quickstart", "--image", path)


def test_damaged_models(flux_folder: Path, tmp_path: Path, failure: Failure) -> None:
    folder = tmp_path / "model"
    shutil.copytree(flux_folder, folder)
    (folder / "transformer" / "config.json").write_text("{")
    assert "cannot be loaded" in failure("generate", "--prompt", "a cube", "--model", folder)
    assert "is a file" in failure("generate", "--prompt", "a cube", "--model", folder / "model_index.json")


def test_bad_sizes_and_guidance(tiny: list[str], failure: Failure) -> None:
    assert "width" in failure(*tiny, "--width", "8")
    assert "height" in failure(*tiny, "--height", "99999")
    assert "guidance" in failure(*tiny, "--guidance", "nan")


@pytest.mark.parametrize("damage", ["condition", "base", "json", "nan"])
def test_bad_adapters(
    damage: str, tiny: list[str], photo: Path, adapters: Path, tmp_path: Path, failure: Failure
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapters / "canny", folder)
    condition, words = "canny", ""
    if damage == "condition":
        condition, words = "deblur", "trained for canny"
    elif damage == "base":
        config = json.loads((folder / "control_config.json").read_text())
        config["base"]["config"]["num_layers"] = 19
        (folder / "control_config.json").write_text(json.dumps(config))
        words = "num_layers 19"
    elif damage == "json":
        (folder / "adapter_config.json").write_text("{")
        words = "adapter_config.json is broken"
    else:
        weights = load_file(folder / "adapter_model.safetensors")
        next(iter(weights.values())).fill_(float("nan"))
        save_file(weights, folder / "adapter_model.safetensors")
        words = "NaN"
    assert words in failure(*tiny, f"--adapter={condition}={folder}", f"--control={condition}={photo}")


def test_trains_an_adapter_that_generate_uses(
    flux_folder: Path, tiny: list[str], photo: Path, capfd: pytest.CaptureFixture[str], failure: Failure
) -> None:
    Path("config.yaml").write_text(
        f"""
        condition: deblur
        output: run
        base: {flux_folder}
        data: {{source: scenes, count: 2, size: 32}}
        adapter: {{options: {{r: 1, num_rotations: 1}}}}
        steps: 1
        batch_size: 2
        """
    )
    assert main(["train", "config.yaml"]) == 0
    assert capfd.readouterr().out == "Wrote run/adapter\nSee run/report.html for curves and pictures\n"
    assert main([*tiny, "--adapter", "deblur=run/adapter", "--control", f"deblur={photo}"]) == 0
    capfd.readouterr()
    assert "--resume" in failure("train", "config.yaml")


def test_help_and_fields(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main([]) == main(["train", "--fields"]) == 0
    shown = capfd.readouterr()
    assert shown.err == "" and shown.out.count("quickstart") >= 4
    assert "learning rate of the adapter" in shown.out


def _difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference, 0..255."""
    pixels = [
        torch.frombuffer(bytearray(p.convert("RGB").tobytes()), dtype=torch.uint8).float() for p in (a, b)
    ]
    return float((pixels[0] - pixels[1]).abs().mean())
