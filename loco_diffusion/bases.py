"""Base models: the packaged one, a local folder, or a model of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

import torch

from loco_diffusion.control.family import Pipeline
from loco_diffusion.embedded import load_packaged_pipeline
from loco_diffusion.errors import UserError


def load_base(model: str | os.PathLike[str] | None, dtype: torch.dtype) -> Pipeline:
    """Load a base model, on the CPU.

    Args:
        model: a folder in diffusers' format or a hub id; None for the packaged base.
        dtype: of its weights.

    Raises:
        UserError: the model is missing or damaged.
    """
    if model is None:
        try:
            return load_packaged_pipeline(dtype)
        except UserError:
            raise
        except Exception as error:  # damaged files have nearly any exception type
            raise UserError(
                f"The packaged base is damaged ({_cause(error)}); reinstall the package."
            ) from error
    name = os.fspath(model)
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder of a model in diffusers' format, or a hub id.")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no model in diffusers' format (it has no model_index.json); give one.")
    if not folder.is_dir() and not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise UserError(f"There is no model folder {name}; check the path.")
    from diffusers import DiffusionPipeline

    source = str(folder) if folder.is_dir() else name
    try:
        return DiffusionPipeline.from_pretrained(source, dtype=dtype)
    except Exception as error:  # a broken file, a wrong id or no connection have many exception types
        if not folder.is_dir():
            raise UserError(
                f"{name} is no folder here and cannot be loaded from the Hugging Face Hub ({_cause(error)}); "
                "check the name, the connection and your access (hf auth login)."
            ) from error
        raise UserError(
            f"The model {name} cannot be loaded ({_cause(error)}); give an intact folder in diffusers' format."
        ) from error


def _cause(error: Exception) -> str:
    """The first words of an error."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return textwrap.shorten(first, 120, placeholder=" ...").rstrip(".:")
