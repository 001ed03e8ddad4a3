"""Checkpoints that are either complete or absent: safetensors for tensors, JSON for everything else.

A checkpoint is a folder `step-00001234` holding `tensors.safetensors` and `state.json`. It is written under a
temporary name and renamed when it is whole, so a process killed at any moment leaves the previous one intact.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loco_diffusion.errors import UserError


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int = 2
) -> Path:
    """Write `folder/step-…` atomically and delete all but the newest `keep` checkpoints.

    Raises:
        UserError: it cannot be written, as on a full disk; older checkpoints stay as they are.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        # `contiguous` keeps views and channels-last weights from being refused or saved twice.
        whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        save_file(whole, partial / "tensors.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Checkpoint {final} cannot be written ({cause}); free space or mend permissions, then resume."
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and state of one checkpoint folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        with safe_open(path / "tensors.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:
        raise _unreadable(path, error) from error
    return tensors, load_state(path)


def load_state(path: Path) -> dict[str, Any]:
    """The state of one checkpoint folder, without its tensors.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return dict(json.loads((path / "state.json").read_text()))
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"Checkpoint {path} cannot be read ({' '.join(str(error).split())}); "
        "delete it to resume from an older one."
    )
