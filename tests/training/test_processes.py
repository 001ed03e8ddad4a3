"""Runs of two processes on the CPU, as `accelerate launch` starts them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from training.steps_together import gradients, step
from training.two_processes import launch

from loco_diffusion.errors import UserError
from loco_diffusion.training.config import make_config
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


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharded_bases_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    config = make_config({"condition": "canny", "output": str(tmp_path / "run"), "steps": 1})
    with pytest.raises(UserError, match=f"does not split the base over processes, as {name} does"):
        train(config)
    assert not (tmp_path / "run").exists()
