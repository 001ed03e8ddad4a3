"""The settings of a LoCO adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from loco_diffusion.adapters.config import AdapterConfig
from loco_diffusion.adapters.registry import add_peft_type
from loco_diffusion.errors import UserError
from loco_diffusion.rotations import ROTATION_MAPS, ChainOrder, RotationMap, resolve_order

LOCO: PeftType = add_peft_type("loco")

RotatedSide = Literal["input", "output", "both"]
PlaneInit = Literal["random", "skew"]


@dataclass
class LoCOConfig(AdapterConfig):
    """Configuration of LoCO, W' = W R_1 ... R_m, each R_k a rotation made from a low-rank skew matrix.

    Source: arXiv 2605.15916. A layer gets 2 * r * num_rotations parameters for each channel that is rotated: with one
    side as many as a LoRA of rank r * num_rotations on a square layer, with both twice as many. The fields' meanings
    are in their help texts.

    Raises:
        UserError: a value is out of its range; the message names the field.
    """

    r: int = field(default=4, metadata={"help": "Planes a rotation turns in; each rotation has rank 2 * r."})
    num_rotations: int = field(default=2, metadata={"help": "Length of the chain of rotations."})
    alpha: float | None = field(
        default=None,
        metadata={
            "help": "The angles are scaled by alpha / r. Default: the layer's r, a scale of 1, because each "
            "plane turns on its own: unlike LoRA's summands, more planes do not add up to a larger angle."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "r for some layers: names (or ends of names, or regular expressions) to values."},
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "alpha for some layers, as rank_pattern."}
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
    side: RotatedSide = field(
        default="both",
        metadata={"help": 'Which channels to rotate: a layer\'s "input", its "output" or "both".'},
    )
    magnitude: bool = field(
        default=False,
        metadata={
            "help": "Learn a positive factor on every input and output channel as well. The weights are then "
            "no longer only rotated, and the adapter cannot be exported to LoRA."
        },
    )
    free: bool = field(
        default=False,
        metadata={
            "help": "Learn what happens between a rotation's 2 * r directions too, which may then shear and stretch; "
            "(2 * r)^2 more parameters a rotation. The weights are then no longer only rotated, but the adapter "
            "still exports to LoRA."
        },
    )
    init: PlaneInit = field(
        default="random",
        metadata={
            "help": 'The planes to start from: "random", or "skew", those in which turning changes the loss '
            "fastest. Those are random, too, until calibration.fit_supports has seen a few batches; "
            "loco-diffusion train calls it."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start at the identity (V zero). False starts at small random rotations, for tests."
        },
    )

    def __post_init__(self) -> None:
        self.peft_type = LOCO
        super().__post_init__()
        self.check_positive("r", "num_rotations")
        for key, rank in self.rank_pattern.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                raise UserError(
                    f"LoCOConfig.rank_pattern[{key!r}] must be a whole number above 0, got {rank!r}."
                )
        alphas = {"alpha": self.r if self.alpha is None else self.alpha}
        alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or not alpha:
                raise UserError(f"LoCOConfig.{name} must be a finite number other than 0, got {alpha!r}.")
        choices = {"map": ROTATION_MAPS, "side": get_args(RotatedSide), "init": get_args(PlaneInit)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"LoCOConfig.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        resolve_order(self.chain_order, self.num_rotations)

    def for_layer(self, key: str) -> LoCOConfig:
        """This configuration with the r and alpha that its patterns give to the layer of this name."""
        return replace(
            self,
            r=self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), key), self.r),
            alpha=self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), key), self.alpha),
            rank_pattern={},
            alpha_pattern={},
        )
