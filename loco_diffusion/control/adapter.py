"""What a controller knows of its adapters, and the strengths that a user gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from loco_diffusion.control.encoder import ConditionEncoder, EncoderConfig, TokensConfig
from loco_diffusion.errors import UserError
from loco_diffusion.options import condition_with

if TYPE_CHECKING:
    from loco_diffusion.conditions import Condition

Route = Literal["encoder", "tokens"]
Window = tuple[float, float]
"""From which to which share of the denoising steps a condition acts."""
ALWAYS: Window = (0.0, 1.0)


@dataclass(frozen=True)
class AdapterInfo:
    """What a controller knows of one of its adapters.

    Attributes:
        condition: the condition it is trained for, a name in `loco_diffusion.conditions`.
        method: peft's name of the adapter method, for example "LOCO".
        encoder: settings of its condition encoder; None on the tokens route.
        tokens: settings of the tokens route; None on the encoder route.
        condition_options: fields of the condition that had other values in training than by default, such as the
            depth network.
    """

    condition: str
    method: str
    encoder: EncoderConfig | None
    tokens: TokensConfig | None = None
    condition_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def route(self) -> Route:
        """How the condition reaches the denoiser."""
        return "encoder" if self.tokens is None else "tokens"

    def make_condition(self) -> Condition:
        """The condition as it was in training, to extract maps with.

        Raises:
            UserError: there is no such condition here, or it has no such options.
        """
        from loco_diffusion.conditions import get_condition

        condition = get_condition(self.condition)
        try:
            return condition_with(condition, self.condition_options)
        except ValueError as error:
            raise UserError(
                f"The adapter was trained with another condition {self.condition!r} than there is here ({error}); "
                "give ready maps."
            ) from error


@dataclass
class Adapter:
    """One adapter of a controller; `fused` is its strength in the base weights, None if it is not in them."""

    info: AdapterInfo
    encoder: ConditionEncoder | None
    has_strength: bool
    fused: float | None = None


def resolve_strengths(
    adapters: Mapping[str, Adapter], given: Iterable[str], strength: float | Mapping[str, float]
) -> dict[str, float]:
    """The strength of each condition.

    Args:
        adapters: all adapters by name.
        given: the names that have a map.
        strength: one for all, or by name; the default is the fused strength or 1.

    Raises:
        UserError: a strength has no map, cannot be used, or differs from the one that is fused.
    """
    names = dict.fromkeys(given)
    if isinstance(strength, Mapping):
        for name in strength:
            if name not in names:
                raise UserError(
                    f"There is a strength for {name!r} but no map; maps are given for {listed(names)}, "
                    f"adapters are {listed(adapters)}."
                )
        strengths = {name: strength.get(name, adapters[name].fused or 1.0) for name in names}
    else:
        strengths = dict.fromkeys(names, strength)
    for name, value in strengths.items():
        check_strength(name, adapters[name], value)
        fused = adapters[name].fused
        if fused is not None and value != fused:
            raise UserError(
                f"The adapter {name!r} is fused at strength {fused:g}; give that strength or call unfuse()."
            )
    return strengths


def resolve_windows(
    given: Iterable[str], start: float | Mapping[str, float], end: float | Mapping[str, float]
) -> dict[str, Window]:
    """When each condition acts.

    Args:
        given: the names that have a map.
        start, end: one for all, or by name; by default it always acts.

    Raises:
        UserError: a name has no map, or a window is not 0 <= start < end <= 1.
    """
    names = dict.fromkeys(given)
    starts, ends = (
        bound if isinstance(bound, Mapping) else dict.fromkeys(names, bound) for bound in (start, end)
    )
    for name in [name for name in (*starts, *ends) if name not in names]:
        raise UserError(
            f"There is a start or end for {name!r} but no map; maps are given for {listed(names)}."
        )
    windows = {name: (starts.get(name, ALWAYS[0]), ends.get(name, ALWAYS[1])) for name in names}
    for name, (first, last) in windows.items():
        if not 0 <= first < last <= 1:
            raise UserError(
                f"The condition {name!r} acts from {first!r} to {last!r} of the steps; give 0 <= start < end <= 1."
            )
    return windows


def check_strength(name: str, adapter: Adapter, strength: float) -> None:
    """Raise UserError unless the strength is a finite number that the adapter's method can do."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise UserError(f"The strength of {name!r} must be a finite number, got {strength!r}.")
    if adapter.info.tokens is not None:
        if strength < 0:
            raise UserError(
                f"The adapter {name!r} is of the tokens route, which has no strength below 0; got {strength:g}."
            )
    elif strength not in (0, 1) and not adapter.has_strength:
        raise UserError(
            f"The {adapter.info.method} adapter {name!r} has no strength but 0 and 1; use one of them."
        )


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(names) or "none"
