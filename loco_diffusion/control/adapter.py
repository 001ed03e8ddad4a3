"""What a controller knows of its adapters, and the strengths that a user gives them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from loco_diffusion.control.encoder import ConditionEncoder, EncoderConfig
from loco_diffusion.errors import UserError


@dataclass(frozen=True)
class AdapterInfo:
    """What a controller knows of one of its adapters.

    Attributes:
        condition: the condition it is trained for, a name in `loco_diffusion.conditions`.
        encoder: settings of its condition encoder.
        method: peft's name of the adapter method, for example "LOCO".
        route: how the condition reaches the denoiser.
    """

    condition: str
    encoder: EncoderConfig
    method: str
    route: Literal["encoder"] = "encoder"


@dataclass
class Adapter:
    """One adapter of a controller; `fused` is its strength in the base weights, None if it is not in them."""

    info: AdapterInfo
    encoder: ConditionEncoder
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


def check_strength(name: str, adapter: Adapter, strength: float) -> None:
    """Raise UserError unless the strength is a finite number that the adapter's method can do."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
        raise UserError(f"The strength of {name!r} must be a finite number, got {strength!r}.")
    if strength not in (0, 1) and not adapter.has_strength:
        raise UserError(
            f"The {adapter.info.method} adapter {name!r} has no strength but 0 and 1; use one of them."
        )


def listed(names: Iterable[str]) -> str:
    """Names for a message."""
    return ", ".join(names) or "none"
