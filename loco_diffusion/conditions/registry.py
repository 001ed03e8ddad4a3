"""What a condition is, and the list of those that the toolkit knows by name."""

from __future__ import annotations

import re
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from loco_diffusion.errors import UserError


class Condition(Protocol):
    """A way to turn a picture into a condition map that controls generation.

    Any object with these two members is a condition; a frozen dataclass is the usual form. A new one is ready
    for training, generation and the demo as soon as it is registered:

        @dataclass(frozen=True)
        class Posterize:
            bits: int = 2
            name: ClassVar[str] = "posterize"

            def extract(self, image, rng=None):
                return ImageOps.posterize(image, self.bits)

        register_condition(Posterize())
    """

    @property
    def name(self) -> str:
        """Lower-case identifier, used on the command line and in configs."""

    def extract(self, image: Image.Image, rng: np.random.Generator | None = None) -> Image.Image:
        """Extract the condition map of a picture.

        Args:
            image: an RGB picture.
            rng: None for the fixed setting of evaluation and use; in training, the generator that draws the
                random parameters of a condition which has any (deblur: the radius; mask: the region), for every
                picture at least one.

        Returns:
            An RGB map of the same size; without `rng` the same one on every call.
        """


ConditionType = TypeVar("ConditionType", bound=Condition)

_REGISTRY: dict[str, Condition] = {}


def register_condition(condition: ConditionType) -> ConditionType:
    """Make a condition known by its name; registering an equal one again changes nothing.

    Returns:
        The condition itself.

    Raises:
        UserError: the name is not a lower-case identifier, or another condition has it.
    """
    name = condition.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"{name!r} cannot name a condition; use lower-case letters, digits and underscores.")
    if _REGISTRY.get(name, condition) != condition:
        raise UserError(f"Another condition is already named {name!r}; choose another name.")
    _REGISTRY[name] = condition
    return condition


def get_condition(name: str) -> Condition:
    """Look up a registered condition.

    Raises:
        UserError: no condition has this name; the message lists those there are.
    """
    if name not in _REGISTRY:
        raise UserError(f"There is no condition {name!r}; choose one of {', '.join(condition_names())}.")
    return _REGISTRY[name]


def condition_names() -> list[str]:
    """Names of the registered conditions, in the order of their registration."""
    return list(_REGISTRY)
