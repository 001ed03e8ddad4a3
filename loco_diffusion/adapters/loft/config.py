"""The settings of a LOFT adapter."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from loco_diffusion.adapters.config import AdapterConfig
from loco_diffusion.adapters.loft.supports import SUPPORTS, Support
from loco_diffusion.adapters.registry import add_peft_type
from loco_diffusion.errors import UserError

LOFT: PeftType = add_peft_type("loft")


@dataclass
class LOFTConfig(AdapterConfig):
    """Configuration of LOFT, W' = W (I + P (R - I) P^T): a rotation R within a frozen subspace P of the inputs.

    Source: arXiv 2605.11872. A layer gets r (r - 1) / 2 parameters, or r^2 with ``free``. The fields' meanings
    are in their help texts.

    Raises:
        UserError: a value is out of its range; the message names the field.
    """

    r: int = field(default=64, metadata={"help": "Dimensions of the subspace that is rotated."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "r for some layers: names (or ends of names, or regular expressions) to values."},
    )
    support: Support = field(
        default="principal",
        metadata={
            "help": 'The subspace: "principal" (top right singular vectors of the weight), "gradient" (of the '
            'loss\'s gradient), "skew" (the planes in which turning changes the loss fastest; r even), "random", '
            '"coordinate", "householder" or "butterfly". "gradient" and "skew" are chosen by '
            "calibration.fit_supports, before training; loco-diffusion train calls it."
        },
    )
    free: bool = field(
        default=False,
        metadata={"help": "Train R as any matrix instead of a rotation; strength then only scales R - I."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start at the identity. False starts at a small random R, for tests."},
    )

    def __post_init__(self) -> None:
        self.peft_type = LOFT
        super().__post_init__()
        if self.support not in SUPPORTS:
            raise UserError(f"LOFTConfig.support must be one of {', '.join(SUPPORTS)}, got {self.support!r}.")
        self._check_rank("r", self.r)
        for key, rank in self.rank_pattern.items():
            self._check_rank(f"rank_pattern[{key!r}]", rank)

    def _check_rank(self, name: str, rank: int) -> None:
        least = 1 if self.free else 2
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < least:
            raise UserError(f"LOFTConfig.{name} must be a whole number, at least {least}, got {rank!r}.")
        if self.support == "skew" and rank % 2:
            raise UserError(
                f'LOFTConfig.{name} must be even, because support="skew" consists of planes, got {rank}.'
            )

    def for_layer(self, key: str) -> LOFTConfig:
        """This configuration with the r that its pattern gives to the layer of this name."""
        rank = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), key), self.r)
        return replace(self, r=rank, rank_pattern={})
