"""The settings of a LoCO adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType

from loco_diffusion.adapters.registry import add_peft_type
from loco_diffusion.errors import UserError
from loco_diffusion.rotations import ROTATION_MAPS, ChainOrder, RotationMap, resolve_order

LOCO: PeftType = add_peft_type("loco")


@dataclass
class LoCOConfig(PeftConfig):
    """Configuration of LoCO, W' = W R_1 ... R_m, each R_k a rotation made from a low-rank skew matrix.

    Source: arXiv 2605.15916. A layer gets 2 * r * num_rotations * in_features parameters, as many as a LoRA
    of rank r * num_rotations on a square layer. The fields' meanings are in their help texts.

    Raises:
        UserError: a value is out of its range; the message names the field.
    """

    r: int = field(default=4, metadata={"help": "Planes a rotation turns in; each rotation has rank 2 * r."})
    num_rotations: int = field(default=4, metadata={"help": "Length of the chain of rotations."})
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "The angles are scaled by alpha / r. Default: r, a scale of 1, because each plane turns "
            "on its own: unlike LoRA's summands, more planes do not add up to a larger angle."
        },
    )
    chain_order: ChainOrder = field(
        default="exact",
        metadata={
            "help": '"exact", or 0 .. num_rotations - 1: how many products between rotations to keep. 0 only '
            "adds the rotations up; all but the highest order are only nearly orthogonal."
        },
    )
    map: RotationMap = field(
        default="cayley", metadata={"help": 'From angles to rotations: "cayley" or "exp".'}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names (or ends of names) of the linear layers to adapt, a regular expression, or "
            "'all-linear'. Default: the attention projections, for the diffusers denoisers that are known."
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
    bias: Literal["none", "all", "loco_only"] = field(
        default="none",
        metadata={
            "help": 'Which biases to train: "none", "all" or "loco_only" (those of the adapted layers).'
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start at the identity (V zero). False starts at small random rotations, for tests."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOCO
        for name in ("r", "num_rotations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise UserError(f"LoCOConfig.{name} must be a whole number above 0, got {value!r}.")
        if self.alpha is None:
            self.alpha = float(self.r)
        if not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha):
            raise UserError(f"LoCOConfig.alpha must be a finite number, got {self.alpha!r}.")
        if self.map not in ROTATION_MAPS:
            raise UserError(f"LoCOConfig.map must be one of {', '.join(ROTATION_MAPS)}, got {self.map!r}.")
        resolve_order(self.chain_order, self.num_rotations)
        if self.bias not in ("none", "all", "loco_only"):
            raise UserError(f"LoCOConfig.bias must be one of none, all, loco_only, got {self.bias!r}.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("LoCOConfig.layers_pattern needs layers_to_transform: say which layers to adapt.")
        # Sets, because peft compares and merges them as sets.
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; sets become sorted lists, so that equal adapters give equal files."""
        return {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in super().to_dict().items()
        }
