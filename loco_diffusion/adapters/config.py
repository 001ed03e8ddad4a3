"""The settings that the adapters share: which layers they sit on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from loco_diffusion.errors import UserError


@dataclass
class AdapterConfig(PeftConfig):
    """Base of the methods' configurations. The fields' meanings are in their help texts.

    A method's own class sets ``peft_type`` before it calls ``super().__post_init__()``.

    Raises:
        UserError: a value is out of its range; the message names the field.
    """

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or ends of names) of the layers to adapt, or a regular expression, or, for the "
            "diffusers denoisers that are known, 'attention' (the default), 'attention+ff' or 'all-linear'."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of the layers not to adapt."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; all, if not given."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train in full and to save with the adapter."}
    )
    bias: str = field(
        default="none",
        metadata={
            "help": 'Which biases to train: "none", "all" or, with the method\'s name, "loco_only" (those of the '
            "adapted layers)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        biases = ("none", "all", f"{str(getattr(self.peft_type, 'value', self.peft_type)).lower()}_only")
        if self.bias not in biases:
            raise UserError(
                f"{type(self).__name__}.bias must be one of {', '.join(biases)}, got {self.bias!r}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError(
                f"{type(self).__name__}.layers_pattern needs layers_to_transform: say which layers to adapt."
            )
        # Sets, because peft compares and merges them as sets.
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)

    def check_positive(self, *names: str) -> None:
        """Raise UserError unless these fields are whole numbers above 0."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise UserError(
                    f"{type(self).__name__}.{name} must be a whole number above 0, got {value!r}."
                )

    def for_layer(self, key: str) -> AdapterConfig:
        """This configuration with what its patterns say about the layer of this name."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; sets become sorted lists, so that equal adapters give equal files."""
        return {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()
        }
