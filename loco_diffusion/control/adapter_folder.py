"""An adapter on disk: peft's two files, the condition encoder, and what both were trained for."""

from __future__ import annotations

import copy
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn

from loco_diffusion.adapters import peft_folder
from loco_diffusion.adapters.peft_folder import (
    ADAPTER_FILE,
    METHOD_FILE,
    PEFT_PREFIX,
    PeftFolder,
    all_finite,
    broken,
    check_complete,
    read_json,
    read_weights,
)
from loco_diffusion.control.adapter import Route
from loco_diffusion.control.encoder import EncoderConfig, TokensConfig
from loco_diffusion.control.family import Pipeline, family_of
from loco_diffusion.control.identity import are_related, revision_of, sample_weights
from loco_diffusion.errors import UserError

if TYPE_CHECKING:
    from diffusers import ModelMixin

CONTROL_FILE = "control_config.json"
ENCODER_FILE = "control_encoder.safetensors"
FILES = (METHOD_FILE, ADAPTER_FILE, CONTROL_FILE, ENCODER_FILE)
DOCUMENTS = ("README.md", "training_config.yaml", "samples.png")
"""What may lie beside them for people: the model card, how it was trained, and what it draws."""
PACKAGES = ("loco-diffusion", "torch", "diffusers", "transformers", "peft", "accelerate")


class BaseDescription(BaseModel):
    """The base model that an adapter was trained on.

    Attributes:
        denoiser: its class.
        config: the numbers of its config that the adapter's weights depend on.
        name_or_path: a hub id, or the name of a folder.
        revision: the commit, of a model from the hub.
        weights: see `identity.sample_weights`; adapters of earlier versions have none.
    """

    model_config = ConfigDict(extra="forbid")

    denoiser: str
    config: dict[str, int]
    name_or_path: str | None = None
    revision: str | None = None
    weights: dict[str, list[float]] = Field(default_factory=dict)


class ControlConfig(BaseModel):
    """The content of control_config.json."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    route: Route = "encoder"
    condition: str
    condition_options: dict[str, Any] = Field(default_factory=dict)
    encoder: EncoderConfig | None = None
    tokens: TokensConfig | None = None
    base: BaseDescription
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the packages that wrote it."""

    @model_validator(mode="after")
    def _settings_are_the_routes(self) -> ControlConfig:
        if (self.encoder is None, self.tokens is None) != (self.route == "tokens", self.route == "encoder"):
            raise ValueError(f"the {self.route} route has settings of its own and no others")
        return self


@dataclass(frozen=True)
class AdapterFolder(PeftFolder):
    """What an adapter folder holds.

    Attributes:
        control: route, condition, encoder settings and base.
        encoder: the condition encoder's weights; none on the tokens route.
    """

    control: ControlConfig
    encoder: dict[str, Tensor]


def describe_base(pipe: Pipeline) -> BaseDescription:
    """The base model of a pipeline."""
    family = family_of(pipe)
    denoiser = family.denoiser(pipe)
    name_or_path = pipe.config.get("_name_or_path")
    return BaseDescription(
        denoiser=type(denoiser).__name__,
        config=family.base_numbers(pipe),
        name_or_path=portable_name(name_or_path),
        revision=revision_of(name_or_path),
        weights=sample_weights(denoiser),
    )


def check_base(folder: Path, trained: BaseDescription, present: BaseDescription, denoiser: nn.Module) -> None:
    """Raise UserError if the adapter in a folder was trained for another base model than the present one.

    Args:
        folder: for the message.
        trained: of the adapter.
        present: the other's class, numbers and name.
        denoiser: whose weights are compared; those of a fine-tuned or distilled model pass for its origin's.
    """
    source = f" ({trained.name_or_path})" if trained.name_or_path else ""
    theirs, ours = f"a {trained.denoiser}", f"a {present.denoiser}"
    if theirs == ours:
        names = sorted(trained.config.keys() | present.config)
        wrong = [name for name in names if trained.config.get(name) != present.config.get(name)]
        if not wrong:
            _check_weights(folder, trained, present, denoiser)
            return
        theirs, ours = (
            ", ".join(f"{name} {config.get(name)}" for name in wrong)
            for config in (trained.config, present.config)
        )
    raise UserError(
        f"The adapter in {folder} was trained for a model with {theirs}{source}, this pipeline has {ours}; "
        "load the base model it belongs to."
    )


def _check_weights(
    folder: Path, trained: BaseDescription, present: BaseDescription, denoiser: nn.Module
) -> None:
    if not are_related(trained.weights, denoiser):
        theirs = trained.name_or_path or f"a {trained.denoiser}"
        ours = present.name_or_path if present.name_or_path != theirs else None
        raise UserError(
            f"The adapter in {folder} was trained on the weights of {theirs}, and those of this model"
            f"{f' ({ours})' if ours else ''} have nothing in common with them; load the base model it belongs to."
        )


def check_denoiser(folder: Path, trained: BaseDescription, denoiser: ModelMixin) -> None:
    """As `check_base` of a denoiser without its pipeline, by those of the numbers that are in its own config."""
    present = {name: denoiser.config.get(name) for name in trained.config}
    present = {name: number for name, number in present.items() if isinstance(number, int)}
    shared = {name: trained.config[name] for name in present}
    check_base(
        folder,
        trained.model_copy(update={"config": shared}),
        BaseDescription(denoiser=type(denoiser).__name__, config=present),
        denoiser,
    )


def portable_name(name_or_path: str | None) -> str | None:
    """A hub id as it is; of a local folder only the name, because its place means nothing elsewhere."""
    if not name_or_path:
        return None
    return Path(name_or_path).name if Path(name_or_path).exists() else name_or_path


def read(folder: Path) -> AdapterFolder:
    """Read and check an adapter folder.

    Raises:
        UserError: a file is missing or damaged, the method is unknown, or weights are not finite.
    """
    check_complete(folder, (METHOD_FILE, ADAPTER_FILE, CONTROL_FILE))
    control = _read_control(folder / CONTROL_FILE)
    content = peft_folder.read(folder)
    encoder: dict[str, Tensor] = {}
    if control.route == "encoder":
        check_complete(folder, FILES)
        encoder = read_weights(folder / ENCODER_FILE)
    return AdapterFolder(content.method, content.adapter, control, encoder)


def read_any(folder: Path) -> PeftFolder:
    """Read and check an adapter folder, or one that peft saved, which has no condition encoder.

    Raises:
        UserError: as `read`.
    """
    return read(folder) if (folder / CONTROL_FILE).is_file() else peft_folder.read(folder)


def check_target(folder: Path) -> None:
    """Check, before any costly work, that `write` will accept a folder: new, empty, or an adapter's.

    Raises:
        UserError: it is a file, holds anything but an adapter, or cannot be written.
    """
    parent = next(place for place in folder.absolute().parents if place.exists())
    try:
        if folder.is_dir():
            content = {entry.name for entry in folder.iterdir()}
            foreign = sorted(content - {*FILES, *DOCUMENTS})
            if foreign:
                raise UserError(
                    f"{folder} holds other files than an adapter's ({foreign[0]}); choose an empty folder."
                )
        elif folder.exists():
            raise UserError(f"{folder} is a file; choose a folder for the adapter.")
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"{folder} cannot be written (no folder can be made in {parent}); choose another folder."
        )


def write(folder: Path, content: PeftFolder, documents: Mapping[str, bytes] | None = None) -> Path:
    """Write an adapter folder atomically: at any moment it is complete, absent, or what it was before.

    Args:
        folder: see `check_target`.
        content: of the adapter.
        documents: contents of files that lie beside it, by their names among `DOCUMENTS`.

    Returns:
        `folder`.

    Raises:
        UserError: see `check_target`; or weights are not finite, or writing fails.
    """
    control = content if isinstance(content, AdapterFolder) else None
    if not all_finite(content.adapter) or (control and not all_finite(control.encoder)):
        raise UserError(
            "The adapter has weights that are NaN or infinite; train it with a lower learning rate."
        )
    check_target(folder)
    token = secrets.token_hex(4)
    partial, old = (folder.absolute().parent / f".{folder.name}.{token}.{kind}" for kind in ("new", "old"))
    try:
        partial.mkdir(parents=True)
        method = copy.copy(content.method)
        method.inference_mode = True
        method.save_pretrained(str(partial))
        save_file(_portable(content.adapter, PEFT_PREFIX), partial / ADAPTER_FILE, {"format": "pt"})
        if control:
            if control.encoder:
                save_file(_portable(control.encoder), partial / ENCODER_FILE, {"format": "pt"})
            (partial / CONTROL_FILE).write_text(control.control.model_dump_json(indent=2) + "\n")
        for name, document in (documents or {}).items():
            (partial / name).write_bytes(document)
        if folder.exists():
            os.rename(folder, old)  # a folder that is not empty cannot be replaced in one step
        os.rename(partial, folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _portable(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {prefix + name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder} cannot be written ({error.strerror or error}); choose another folder.")


def _read_control(file: Path) -> ControlConfig:
    content = read_json(file)
    if isinstance(content.get("format"), int) and content["format"] > 1:
        raise UserError(f"{file} was written by a newer version; update loco-diffusion.")
    try:
        return ControlConfig.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise broken(file, f"{place}: {first['msg']}") from error
