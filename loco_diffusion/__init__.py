"""Controllable image generation with orthogonal adapters for frozen diffusion models.

Importing the package registers its adapters with peft, so that peft and diffusers can load them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loco_diffusion.adapters import LoCAConfig, LoCOConfig, LOFTConfig

if TYPE_CHECKING:
    from loco_diffusion.control.controller import Controller

__all__ = ["Controller", "LOFTConfig", "LoCAConfig", "LoCOConfig"]


def __getattr__(name: str) -> Any:
    # Controller pulls in diffusers, which takes seconds that a user of the adapters alone should not pay.
    if name == "Controller":
        from loco_diffusion.control.controller import Controller

        return Controller
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
