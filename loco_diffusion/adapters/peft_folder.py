"""An adapter on disk as peft saves it: its configuration, and its weights as safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file
from torch import Tensor

from loco_diffusion.errors import UserError

METHOD_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."  # what PeftModel.from_pretrained expects before every name


@dataclass(frozen=True)
class PeftFolder:
    """What a folder of peft's holds.

    Attributes:
        method: peft's config of the adapter.
        adapter: the adapter's weights, named as in the base model.
    """

    method: PeftConfig
    adapter: dict[str, Tensor]


def find(path_or_hub_id: str | os.PathLike[str]) -> Path:
    """The adapter folder at a path, or downloaded from the Hugging Face Hub (only the adapter's own files).

    Raises:
        UserError: there is no such folder, and it is no hub id or the download fails.
    """
    repository = os.fspath(path_or_hub_id)
    path = Path(repository).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError):  # too long or too odd to be a path
        is_folder = exists = False
    if is_folder:
        return path
    if exists:
        raise UserError(f"{path} is a file; give the folder of the adapter.")
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repository):
        raise UserError(f"There is no adapter folder {repository}; check the path.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[METHOD_FILE, ADAPTER_FILE, "control_*"]))
    except Exception as error:  # network, cache, authentication, validation: many types
        raise UserError(
            f"{repository} is no folder here and could not be downloaded from the Hugging Face Hub "
            f"({type(error).__name__}); check the name and the connection."
        ) from error


def check_complete(folder: Path, files: Sequence[str]) -> None:
    """Look for files that an adapter folder must have.

    Raises:
        UserError: one of them is missing.
    """
    for file in files:
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} is no adapter folder: it has no {file}; give the folder of an adapter."
            )


def read(folder: Path) -> PeftFolder:
    """Read and check an adapter folder; never a pickle.

    Raises:
        UserError: a file is missing or damaged, the method is unknown, or weights are not finite.
    """
    check_complete(folder, (METHOD_FILE, ADAPTER_FILE))
    weights = read_weights(folder / ADAPTER_FILE)
    method = _read_method(folder / METHOD_FILE)
    return PeftFolder(method, {name.removeprefix(PEFT_PREFIX): value for name, value in weights.items()})


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise broken(file, error) from error
    if not isinstance(content, dict):
        raise broken(file, "it holds no JSON object")
    return content


def broken(file: Path, reason: Exception | str) -> UserError:
    """What to raise where a file of an adapter cannot be used."""
    text = one_line(reason) if isinstance(reason, Exception) else reason
    return UserError(f"{file} is broken ({text}); save or download the adapter again.")


def _read_method(file: Path) -> PeftConfig:
    method = read_json(file).get("peft_type")
    if method not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(
            f"{file} names the unknown adapter method {method!r}; update loco-diffusion and peft."
        )
    try:
        return PeftConfig.from_pretrained(str(file.parent))
    except Exception as error:  # a config class raises whatever its checks raise
        raise broken(file, error) from error


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, on the CPU, by name.

    Raises:
        UserError: the file cannot be read, or a value is NaN or infinite.
    """
    try:
        weights = load_file(file)
    except Exception as error:  # safetensors has its own exception type
        raise broken(file, error) from error
    if not all_finite(weights):
        raise UserError(f"{file} has weights that are NaN or infinite; download or train the adapter again.")
    return weights


def one_line(error: BaseException) -> str:
    """An exception's message on one line; its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def all_finite(weights: Mapping[str, Tensor]) -> bool:
    """Whether no weight is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
