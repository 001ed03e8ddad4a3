"""The configuration of a training run: what a YAML file may say, with the meaning of every field."""

from __future__ import annotations

import difflib
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from loco_diffusion.embedded import DEFAULT_BASE, PACKAGED_BASES
from loco_diffusion.errors import UserError
from loco_diffusion.options import condition_with
from loco_diffusion.training.data_config import DATA_SOURCES, Data, DatasetData, ScenesData
from loco_diffusion.training.settings import (
    AdapterSettings,
    EncoderSettings,
    Settings,
    TimestepSettings,
    TokensSettings,
    ValidationSettings,
)

if typing.TYPE_CHECKING:
    from loco_diffusion.conditions import Condition


class TrainingConfig(Settings):
    """One training run: a condition, an adapter, data, and how to optimise."""

    condition: str = Field(
        description="Condition to train for: canny, depth, mask, colorization, deblur, ..."
    )
    output: str = Field(description="Folder of the run: adapter/, checkpoints/, log.jsonl, config.yaml.")
    base: str = Field(
        default=DEFAULT_BASE,
        description=f"Frozen base: {', '.join(PACKAGED_BASES)}, a diffusers folder, or a hub id.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Type of the frozen base's weights; what is trained is always float32."
    )
    condition_options: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the condition's own class where maps are extracted: training_radii of deblur; "
        "training_shapes and training_inverted of mask; low and high of canny; model and device of depth.",
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        default=None,
        description="Of the frozen denoiser's linear layers: int8 (of torchao), or nf4, 4 bits (of bitsandbytes, on a "
        "GPU). Adapters that are fitted to weights or their gradients need none.",
    )
    data: Annotated[Data, Field(discriminator="source")] = Field(
        default=ScenesData(source="scenes"),
        description="Captioned pictures, by source: scenes, folder, dataset or tars. Captions are cut to what "
        "the base's text encoders read.",
    )
    encoder: EncoderSettings = Field(
        default=EncoderSettings(), description="The control-condition encoder, of the encoder route."
    )
    tokens: TokensSettings | None = Field(
        default=None, description="To take the tokens route, which has no encoder, instead: its settings."
    )
    adapter: AdapterSettings = Field(default_factory=AdapterSettings, description="The adapter.")
    timesteps: TimestepSettings = Field(default=TimestepSettings(), description="How noise levels are drawn.")
    steps: int = Field(ge=1, description="Optimizer steps.")
    batch_size: int = Field(default=32, ge=1, description="Pictures a process and backward pass.")
    accumulation: int = Field(default=1, ge=1, description="Backward passes an optimizer step.")
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = Field(
        default="adamw",
        description="AdamW; with its moments in 8 bits (of bitsandbytes); or Prodigy, which finds the learning "
        "rate itself (of prodigyopt; Mishchenko and Defazio 2023, arXiv 2306.06101).",
    )
    lr: float = Field(
        default=3e-3,
        gt=0,
        description="Peak learning rate of the adapter; for prodigy a factor on its own estimate, 1 by default.",
    )
    encoder_lr: float = Field(
        default=1e-3, gt=0, description="Peak learning rate of the condition encoder; for prodigy as lr."
    )
    lr_scheduler: Literal["trapezoid", "constant", "linear", "cosine"] = Field(
        default="trapezoid",
        description="Learning rates after the warmup: constant and then falling linearly, or as diffusers has them: "
        "constant, or falling to 0 linearly or along a cosine.",
    )
    warmup_steps: int = Field(
        default=0, ge=0, description="Steps over which learning rates rise linearly from 0."
    )
    decay: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Of trapezoid: last share of the steps, over which learning rates fall linearly to 0.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        description="The optimizer's, on the adapter; on rotations it would pull angles to 0.",
    )
    encoder_weight_decay: float = Field(
        default=0.01, ge=0, description="The optimizer's, on the condition encoder."
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="The optimizer's decay rates of its two moments."
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="To save, and validate, a moving average of what is trained: how much of it stays in a step, such "
        "as 0.999; less in the first ones.",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Whether blocks of the denoiser are computed again in the backward pass, which saves memory.",
    )
    torch_compile: bool = Field(
        default=False,
        description="Whether blocks of the denoiser are compiled: takes minutes, then steps are faster. Encoder route.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradients are clipped to this norm, all together."
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        default="no", description="Autocast of the forward pass."
    )
    guidance: float | None = Field(
        default=1.0, ge=0, description="Fed to guidance-distilled bases in training; others ignore it."
    )
    text_dropout: float = Field(
        default=0.1, ge=0, le=1, description="Share of examples that lose their caption."
    )
    condition_dropout: float = Field(
        default=0.1, ge=0, le=1, description="Share of examples that lose their map."
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Of the initial weights, the data order and every random draw.",
    )
    validation: ValidationSettings = Field(
        default=ValidationSettings(), description="The pictures that the run is watched by."
    )
    log_with: tuple[str, ...] = Field(
        default=(),
        description="Trackers beside log.jsonl: tensorboard, wandb, or others that accelerate knows.",
    )
    checkpoint_every: int = Field(default=200, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Older checkpoints are deleted.")
    log_every: int = Field(default=10, ge=1, description="Steps between lines of log.jsonl.")
    cache_gigabytes: float = Field(
        default=4.0,
        ge=0,
        description="Without cache_folder: text embeddings, then latents and condition maps, are computed once "
        "if those of all pictures fit into this much memory, and otherwise in every step.",
    )
    cache_folder: str | None = Field(
        default=None,
        description="Folder in which text embeddings, latents and condition maps are kept, for this run and for "
        "later ones with the same pictures; they are read from there as needed.",
    )

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _yaml_reads_no_as_false(cls, value: Any) -> Any:
        return "no" if value is False else value

    @field_validator("log_with")
    @classmethod
    def _trackers_exist(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        from accelerate.utils import LoggerType

        known = sorted({str(name.value) for name in LoggerType} - {"all"})
        for name in value:
            if name not in known:
                raise ValueError(f"there is no tracker {name!r}; choose from {', '.join(known)}")
        return value

    @model_validator(mode="before")
    @classmethod
    def _rates_of_prodigy(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("optimizer") == "prodigy":
            return {"lr": 1.0, "encoder_lr": 1.0, **fields}
        return fields

    @model_validator(mode="after")
    def _one_rate_for_prodigy(self) -> TrainingConfig:
        if self.optimizer == "prodigy" and self.lr != self.encoder_lr:
            raise ValueError(
                f"prodigy has one learning rate for all, but lr is {self.lr:g} and encoder_lr {self.encoder_lr:g}; "
                "leave both out"
            )
        return self

    @field_validator("condition")
    @classmethod
    def _condition_exists(cls, value: str) -> str:
        from loco_diffusion.conditions import get_condition

        return get_condition(value).name

    @field_validator("condition_options")
    @classmethod
    def _options_fit_the_condition(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        from loco_diffusion.conditions import get_condition

        if "condition" in info.data:  # it is a known one
            condition_with(get_condition(info.data["condition"]), value)
        return value

    @model_validator(mode="after")
    def _streams_are_not_cached(self) -> TrainingConfig:
        if isinstance(self.data, DatasetData) and self.data.streaming and self.cache_folder is not None:
            raise ValueError("a stream is not cached; remove cache_folder or data.streaming")
        return self

    @model_validator(mode="after")
    def _the_adapter_learns(self) -> TrainingConfig:
        if self.adapter.fit_after and self.tokens is not None:
            raise ValueError(
                "the tokens route has no encoder that could learn first; remove adapter.fit_after"
            )
        if self.adapter.fit_after >= self.steps:
            raise ValueError(
                f"adapter.fit_after is {self.adapter.fit_after}, so that in {self.steps} steps the adapter would not "
                "learn; lower it"
            )
        return self

    @model_validator(mode="after")
    def _what_compiles(self) -> TrainingConfig:
        if self.torch_compile and self.tokens is not None:
            raise ValueError(
                "on the tokens route every block would be compiled for itself; remove torch_compile or tokens"
            )
        return self

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of what the denoiser's layers compute in."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return half.get(self.mixed_precision, getattr(torch, self.dtype))

    def make_condition(self) -> Condition:
        """The condition with its options."""
        from loco_diffusion.conditions import get_condition

        return condition_with(get_condition(self.condition), self.condition_options)


def load_config(path: str | Path) -> TrainingConfig:
    """Read a configuration from a YAML file.

    Raises:
        UserError: the file is missing or is no YAML, or a field is unknown, missing or wrong; the message
            names the file, the field and the problem.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise UserError(f"The configuration {path} cannot be read ({cause}); check its path.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"The configuration {path} is malformed{where} ({problem}); mend it.") from error
    if not isinstance(content, dict):
        raise UserError(f"The configuration {path} is no list of `field: value` lines; write some.")
    return make_config(content, str(path))


def make_config(fields: dict[str, Any], name: str = "configuration") -> TrainingConfig:
    """Validate fields, as they would stand in YAML.

    Args:
        fields: nested mappings.
        name: of the file, for messages.

    Raises:
        UserError: see `load_config`.
    """
    try:
        return TrainingConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{name}: {_first_problem(error)}.") from error


def config_help() -> str:
    """All fields, one a line with default and meaning, nested ones indented."""
    return "\n".join(_help_lines(TrainingConfig, ""))


def _help_lines(model: type[BaseModel], indent: str) -> typing.Iterator[str]:
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] != "source"):
        default = field.get_default(call_default_factory=True)
        nested = [part for part in _members(field.annotation) if _is_settings(part)]
        if typing.get_origin(field.annotation) is Literal and field.is_required():
            shown = str(typing.get_args(field.annotation)[0])
        else:
            shown = "required" if field.is_required() else "" if nested else str(default)
        text = " ".join(part for part in (field.description, f"[{shown}]" if shown else "") if part)
        yield f"{indent}{name}: {text}"
        for part in nested:
            yield from _help_lines(part, indent + "  ")


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) or (annotation,)


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _first_problem(error: ValidationError) -> str:
    """One clause about the first of the errors: where, what, what instead."""
    first = error.errors()[0]
    tags = set(DATA_SOURCES)  # pydantic names the member of the union; the file does not
    place = [str(part) for number, part in enumerate(first["loc"]) if not (number == 1 and part in tags)]
    where = "field " + ".".join(place) if place else "configuration"
    if first["type"] == "extra_forbidden":
        known = _fields_at(first["loc"][:-1])
        close = difflib.get_close_matches(place[-1], known, n=1)
        remedy = f"did you mean {close[0]}" if close else f"choose from {', '.join(known)}"
        return f"{where} is not known; {remedy}"
    if first["type"] == "missing":
        return f"{where} is missing; add it"
    problem = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    problem = " ".join(problem.rstrip(".").split()).removesuffix("; correct it")
    given = first["input"]
    shown = f", got {given!r}" if isinstance(given, (str, int, float, list)) else ""
    if first["type"] == "value_error":
        return f"{where}: {problem}"
    return f"{where}: {problem[0].lower()}{problem[1:]}{shown}; correct it"


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """Names of the fields that the section at a pydantic location has."""
    model: type[BaseModel] = TrainingConfig
    for part in location:
        if part in model.model_fields:
            parts = [one for one in _members(model.model_fields[str(part)].annotation) if _is_settings(one)]
            model = parts[0] if parts else model
        else:  # the tag of a data source
            model = DATA_SOURCES.get(str(part), model)
    return list(model.model_fields)
