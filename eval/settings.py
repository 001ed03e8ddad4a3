"""What can be benchmarked: protocols, experiments and studies, read from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loco_diffusion.data.scenes import TEST_SEEDS
from loco_diffusion.errors import UserError

FOLDER = Path(__file__).parent


class Settings(BaseModel):
    """Fields of a YAML file; unknown ones are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Bar(Settings):
    """What a score must reach."""

    score: str
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _has_one_bound(self) -> Bar:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"the bar of {self.score} needs at_least or at_most, one of them")
        return self


class RelativeBar(Bar):
    """What a task's score must reach, as a ratio to that of the experiment `than`."""

    task: str
    than: Literal["no-control", "vae-round-trip"]


class Protocol(Settings):
    """On which pictures, with which settings, pictures are drawn and scored."""

    name: str
    description: str
    base: str
    pictures: int = Field(ge=1)
    first_seed: int
    size: int
    tasks: list[str]
    seed: int
    steps: int = Field(ge=1)
    guidance: float
    batch_size: int = Field(ge=1)
    bars: list[RelativeBar] = []

    @model_validator(mode="after")
    def _scenes_are_held_out(self) -> Protocol:
        if self.first_seed not in TEST_SEEDS or self.first_seed + self.pictures - 1 not in TEST_SEEDS:
            raise ValueError(f"the scenes' seeds must be from {TEST_SEEDS[0]} to {TEST_SEEDS[-1]}")
        return self

    def settings(self) -> dict[str, Any]:
        """What the scores depend on, as JSON types."""
        return self.model_dump(mode="json", exclude={"name", "description", "bars", "batch_size"})


class Experiment(Settings):
    """Where a row's pictures come from: the base alone, the base with adapters, or the VAE."""

    name: str
    pictures: Literal["base", "adapters", "vae"]
    adapters: str = "packaged"


class Method(Settings):
    """An adapter as a training configuration names it, and what is special about its runs.

    Attributes:
        tasks: on which it is compared; default: all of the study's.
    """

    method: str
    options: dict[str, Any] = {}
    fit_after: int = 0
    tokens: bool = False
    tasks: list[str] | None = None
    learning_rates: list[float] | None = None


class Study(Settings):
    """Which methods are compared on which tasks, and how each run is trained and scored."""

    name: str
    description: str
    base: str
    tasks: list[str]
    scenes: int = Field(ge=1)
    size: int
    train_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    encoder_lr: float = Field(gt=0)
    learning_rates: list[float] = Field(min_length=1)
    seeds: list[int] = Field(min_length=1)
    validation_pictures: int = Field(ge=1)
    test_pictures: int = Field(ge=1)
    sampling_steps: int = Field(ge=1)
    target_modules: str
    reference: str
    methods: dict[str, Method]

    @model_validator(mode="after")
    def _reference_is_a_method(self) -> Study:
        if self.reference not in self.methods:
            raise ValueError(f"reference {self.reference!r} is none of the methods")
        return self

    def rates(self, method: str) -> list[float]:
        """The learning rates that a method is tried with."""
        return self.methods[method].learning_rates or self.learning_rates


Kind = TypeVar("Kind", Protocol, Experiment, Study)


def read(kind: type[Kind], folder: str, name: str) -> Kind:
    """Read a protocol, an experiment or a study; its name is that of its file, unless it has one of its own.

    Args:
        kind: Protocol, Experiment or Study.
        folder: where those that come with the benchmark are.
        name: one of them, or the path of a YAML file.

    Raises:
        UserError: there is no such file, or it is malformed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / folder / f"{name}.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return kind.model_validate({"name": path.stem, **content})
    except OSError as error:
        known = ", ".join(names(folder))
        raise UserError(f"{name!r} is not among the {folder} and no file; choose from {known}.") from error
    except (yaml.YAMLError, ValidationError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path} is malformed ({' '.join(str(error).split())}); mend it.") from error


def names(folder: str) -> list[str]:
    """The protocols, experiments or studies that come with the benchmark."""
    return sorted(path.stem for path in (FOLDER / folder).glob("*.yaml"))
