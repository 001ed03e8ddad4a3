"""Runs of two processes on the CPU, as `accelerate launch` starts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import FluxPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from training.steps_together import gradients, step
from training.two_processes import launch

from loco_diffusion.errors import UserError
from loco_diffusion.training.config import make_config
from loco_diffusion.training.journal import read_log
from loco_diffusion.training.trainer import train

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
def test_processes_step_together(tmp_path: Path) -> None:
    """All have the parameters of one process with the mean gradients."""
    launch(str(TESTS / "training" / "steps_together.py"), str(tmp_path))
    results = [json.loads((tmp_path / f"{process}-of-2.json").read_text()) for process in range(2)]
    assert results[0] == results[1]
    (a, b), (c, _) = gradients(0), gradients(1)
    assert a is not None and b is not None and c is not None
    for name, parameters in results[0].items():
        expected = step(Accelerator(cpu=True), [(a + c) / 2, b / 2], name)
        torch.testing.assert_close(torch.tensor(parameters), torch.tensor(expected))


@pytest.mark.slow
def test_two_processes_train_and_resume(flux_folder: Path, tmp_path: Path) -> None:
    fields = {
        "condition": "canny",
        "output": str(tmp_path / "run"),
        "base": str(flux_folder),
        "data": {"source": "scenes", "count": 5, "size": 32},
        "encoder": {"hidden_size": 16},
        "adapter": {"options": {"r": 2, "num_rotations": 2, "init": "skew"}},
        "steps": 4,
        "batch_size": 2,
        "checkpoint_every": 2,
        "ema_decay": 0.9,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    command = ["-m", "loco_diffusion.cli", "train", str(tmp_path / "config.yaml")]
    launch(*command)
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    expected = load_file(file)
    shutil.rmtree(file.parent)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    launch(*command, "--resume", "latest")
    resumed = load_file(file)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UserError, match="processes is 2 there and 1 here"):
        train(make_config(fields), resume="latest")


@pytest.mark.slow
def test_a_split_base_gives_the_same_adapter(
    flux: FluxPipeline, stable_diffusion: StableDiffusionPipeline, tmp_path: Path
) -> None:
    bases = {"flux": flux, "unet": stable_diffusion}
    for name, pipe in bases.items():
        pipe.save_pretrained(tmp_path / name)
    for fsdp in (False, True):
        paths = []
        for name in bases:
            fields = {
                "condition": "canny",
                "output": str(tmp_path / f"{name}-{fsdp}"),
                "base": str(tmp_path / name),
                "data": {"source": "scenes", "count": 5, "size": 32},
                "adapter": {"options": {"r": 2, "num_rotations": 2, "side": "both"}},
                "steps": 2,
                "batch_size": 2,
                "log_every": 1,
                "gradient_checkpointing": fsdp,
                "validation": {"pictures": 2, "every": 2, "steps": 1},
            }
            paths.append(tmp_path / f"{name}-{fsdp}.yaml")
            paths[-1].write_text(yaml.safe_dump(fields))
        launch(str(TESTS / "training" / "split_base.py"), *map(str, paths), fsdp=fsdp)
    for name in bases:
        whole, split = (tmp_path / f"{name}-{fsdp}" for fsdp in (False, True))
        for process in range(2):
            assert float((whole / f"share-{process}.json").read_text()) == 1
            assert float((split / f"share-{process}.json").read_text()) < 0.75
        file = "adapter/adapter_model.safetensors"
        torch.testing.assert_close(load_file(split / file), load_file(whole / file))
        logs = [read_log(folder / "log.jsonl") for folder in (whole, split)]
        for key in ("loss", "scores"):
            one, other = ([record[key] for record in log if key in record] for log in logs)
            assert one and one == [pytest.approx(value) for value in other]


@pytest.mark.parametrize(
    ("variable", "fields", "message"),
    [
        ("ACCELERATE_USE_DEEPSPEED", {}, "DeepSpeed splits .* with --use_fsdp, which splits the frozen base"),
        ("ACCELERATE_USE_FSDP", {"tokens": {}}, "FSDP cannot split a base on the tokens route"),
        (
            "ACCELERATE_USE_FSDP",
            {"torch_compile": True},
            "FSDP cannot split a base whose blocks are compiled",
        ),
        (
            "ACCELERATE_USE_FSDP",
            {"quantization": "int8"},
            "FSDP cannot split a base in int8; leave out quanti",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, fields: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv(variable, "true")
    config = make_config({"condition": "canny", "output": str(tmp_path / "run"), "steps": 1, **fields})
    with pytest.raises(UserError, match=message):
        train(config)
    assert not (tmp_path / "run").exists()
