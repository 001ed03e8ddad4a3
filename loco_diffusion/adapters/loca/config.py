"""The settings of a LoCA adapter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from peft.utils import PeftType

from loco_diffusion.adapters.config import AdapterConfig
from loco_diffusion.adapters.registry import add_peft_type
from loco_diffusion.errors import UserError

LOCA: PeftType = add_peft_type("loca")


@dataclass
class LoCAConfig(AdapterConfig):
    """Configuration of LoCA, W' = W + alpha C_out^T S C_in: a few cosine coefficients at learned locations.

    Source: arXiv 2502.06820. A layer stores 3 * num_coefficients values: the coefficients, and two coordinates
    each. Train it with :class:`LocationSchedule`. The fields' meanings are in their help texts.

    Raises:
        UserError: a value is out of its range; the message names the field.
    """

    num_coefficients: int = field(
        default=10_000, metadata={"help": "Coefficients a layer, n; at most as many as it has weights."}
    )
    alpha: float = field(
        default=1.0,
        metadata={
            "help": "Factor on the change of the weight, whose norm is alpha times the coefficients' norm."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start at the identity (coefficients zero). False starts at small random ones, for tests."
        },
    )

    def __post_init__(self) -> None:
        self.peft_type = LOCA
        super().__post_init__()
        self.check_positive("num_coefficients")
        if not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha) or not self.alpha:
            raise UserError(f"LoCAConfig.alpha must be a finite number other than 0, got {self.alpha!r}.")
