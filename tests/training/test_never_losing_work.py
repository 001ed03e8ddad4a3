"""A run that is killed with SIGKILL wherever it stands, or runs out of space, ends like an uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_runs import KILLED, REFUSED, Moment, kill_when, train_in_process
from safetensors.torch import load_file

from loco_diffusion.errors import UserError
from loco_diffusion.training.checkpoints import list_checkpoints, load_checkpoint
from loco_diffusion.training.journal import Journal

_FIELDS: dict[str, Any] = {
    "condition": "canny",
    "data": {"source": "scenes", "count": 5, "size": 32},
    "encoder": {"hidden_size": 16},
    "adapter": {"method": "lora", "options": {"r": 2, "lora_dropout": 0.5}},
    "steps": 6,
    "batch_size": 2,
    "checkpoint_every": 2,
    "keep_checkpoints": 1,
    "log_every": 1,
    "validation": {"pictures": 1, "every": 3, "steps": 1},
}
KILLS: list[tuple[Moment, int]] = [
    (Moment("os.mkdir", ".step-00000002.partial"), 0),
    (Moment("open", ".step-00000002.partial/state.json"), 0),  # the tensors are there
    (Moment("os.rename", "/step-00000002"), 0),
    (Moment("open", "/checkpoints"), 2),  # right after the rename
    (Moment("os.rename", "samples/step-00000003.png"), 2),
    (Moment("shutil.rmtree", "/step-00000002"), 4),  # the older checkpoint
    (Moment("os.rename", "samples/step-00000006.png"), 6),
    (Moment("os.rename", "report.html"), 6),
    (Moment("os.mkdir", ".new"), 6),  # the adapter
    (Moment("open", ".new/control_config.json"), 6),
    (Moment("os.rename", "/adapter"), 6),
]
"""Moments, and the step of the newest checkpoint that is left then."""


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_an_uninterrupted_one(
    flux_folder: Path, tmp_path: Path
) -> None:
    whole, killed = ({**_FIELDS, "base": str(flux_folder), "output": str(tmp_path / n)} for n in ("a", "b"))
    assert train_in_process(whole) == 0
    output = tmp_path / "b"
    # In the middle of a step, and before any checkpoint.
    ready = kill_when(lambda: any("loss" in line for line in _log(output)))
    assert train_in_process(killed, meanwhile=ready) == KILLED
    assert _newest(output) == 0
    for moment, left in KILLS:
        assert train_in_process(killed, moment) == KILLED, moment
        assert _newest(output) == left, moment
        assert not (output / "adapter").exists()
    assert train_in_process(killed) == 0

    _assert_equal(tmp_path / "a", output)
    assert sorted(path.name for path in output.iterdir()) == [
        ".lock",
        "adapter",
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "report.html",
        "samples",
    ]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000006"]
    assert sorted(path.name for path in (output / "samples").iterdir()) == [
        "step-00000003.png",
        "step-00000006.png",
    ]


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(flux_folder: Path, tmp_path: Path) -> None:
    fields = {**_FIELDS, "validation": {"pictures": 0, "every": 99}}  # pictures would meet the limit first
    whole, full = ({**fields, "base": str(flux_folder), "output": str(tmp_path / n)} for n in ("a", "b"))
    assert train_in_process(whole) == 0
    output = tmp_path / "b"
    after_two = kill_when(lambda: _newest(output) == 2)
    assert train_in_process(full, meanwhile=after_two) == KILLED
    size = (output / "checkpoints" / "step-00000002" / "tensors.safetensors").stat().st_size
    assert train_in_process(full, largest_file=size // 2) == REFUSED
    error = (tmp_path / "b.error").read_text()
    assert "step-00000004 cannot be written (" in error and "File too large" in error
    assert _newest(output) == 2 and not (output / "adapter").exists()
    load_checkpoint(list_checkpoints(output / "checkpoints")[0])
    assert train_in_process(full) == 0
    _assert_equal(tmp_path / "a", output)


def test_a_log_on_a_full_device_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    journal = Journal(path, 0, enabled=True)
    journal.write({"step": 1})
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(
        UserError, match=r"log.jsonl cannot be written \(No space left on device\); free space"
    ):
        journal.write({"step": 2})


def _newest(output: Path) -> int:
    checkpoints = list_checkpoints(output / "checkpoints")
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0


def _log(output: Path) -> list[str]:
    path = output / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _assert_equal(one: Path, other: Path) -> None:
    """Weights, pictures and logs of two runs are the same."""
    for file in ("adapter_model.safetensors", "control_encoder.safetensors"):
        first, second = (load_file(output / "adapter" / file) for output in (one, other))
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    for picture in (one / "samples").glob("*"):
        assert picture.read_bytes() == (other / "samples" / picture.name).read_bytes()
    for line, again in zip(_log(one), _log(other), strict=True):
        before, after = json.loads(line), json.loads(again)
        assert before.keys() == after.keys()
        assert {k for k in before if before[k] != after[k]} <= {"images_per_second", "time", "run"}
