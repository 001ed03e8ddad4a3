"""Base models: the packaged one, a local folder, or a model of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from loco_diffusion.control.family import Pipeline
from loco_diffusion.embedded import DEFAULT_BASE, PACKAGED_BASES, packaged_base
from loco_diffusion.errors import UserError
from loco_diffusion.quantization import Quantization, quantization_config

if TYPE_CHECKING:
    from diffusers import ModelMixin

Loaded = TypeVar("Loaded")


DENOISERS = ("transformer", "unet")  # what pipelines call them


def load_base(
    model: str | os.PathLike[str] | None, dtype: torch.dtype, quantization: Quantization | None = None
) -> Pipeline:
    """Load a base model, on the CPU (but where the quantisation needs a GPU).

    Args:
        model: a folder in diffusers' format, a hub id, or the name of a packaged base ("packaged-dit" or
            "packaged-unet", which None is, too).
        dtype: of its weights.
        quantization: of the denoiser's linear layers.

    Raises:
        UserError: the model is missing or damaged, or cannot be quantised here.
    """
    from diffusers import DiffusionPipeline

    def load(source: str) -> Pipeline:
        if quantization is None:
            return DiffusionPipeline.from_pretrained(source, dtype=dtype)
        settings = quantization_config(quantization, _denoiser_name(source), dtype)
        return DiffusionPipeline.from_pretrained(source, dtype=dtype, quantization_config=settings)

    return _load(model, load)


def load_denoiser(model: str | os.PathLike[str] | None) -> tuple[str, ModelMixin]:
    """Load nothing of a base model but its denoiser, on the CPU, in float32.

    Args:
        model: as for `load_base`; of any family.

    Returns:
        What the pipeline calls it, "transformer" or "unet", and the denoiser.

    Raises:
        UserError: the model is missing or damaged, or has no denoiser of this name.
    """
    return _load(model, _denoiser_of)


def _denoiser_of(source: str) -> tuple[str, ModelMixin]:
    from diffusers import AutoModel

    name = _denoiser_name(source)
    return name, AutoModel.from_pretrained(source, subfolder=name, dtype=torch.float32)


def _denoiser_name(source: str) -> str:
    from diffusers import DiffusionPipeline

    components = DiffusionPipeline.load_config(source)
    for name in DENOISERS:
        if name in components:
            return name
    raise UserError(f"The model {source} has neither a {' nor a '.join(DENOISERS)}; give a diffusion model.")


def is_packaged(model: str | os.PathLike[str] | None) -> bool:
    """Whether this names a packaged base; see `load_base`."""
    return model is None or os.fspath(model) in PACKAGED_BASES


def _load(model: str | os.PathLike[str] | None, load: Callable[[str], Loaded]) -> Loaded:
    """What a function loads of a base model, given its folder or hub id."""
    name = DEFAULT_BASE if model is None else os.fspath(model)
    if name in PACKAGED_BASES:
        try:
            return load(str(packaged_base(name)))
        except UserError:
            raise
        except Exception as error:  # damaged files have nearly any exception type
            raise UserError(
                f"The packaged base is damaged ({_cause(error)}); reinstall the package."
            ) from error
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder of a model in diffusers' format, or a hub id.")
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no model in diffusers' format (it has no model_index.json); give one.")
    if not folder.is_dir() and not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        raise UserError(f"There is no model folder {name}; check the path.")
    try:
        return load(str(folder) if folder.is_dir() else name)
    except UserError:
        raise
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
