"""How a picture is drawn."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn.

    Attributes:
        width: in pixels, a multiple of the base's token size (16 for FLUX.1, 8 for Stable Diffusion).
        height: as width.
        steps: denoising steps, at least 1.
        guidance: the embedded guidance scale of a guidance-distilled base (FLUX.1-dev); of others the scale
            of classifier-free guidance against the empty prompt, where 1 is none.
    """

    width: int
    height: int
    steps: int
    guidance: float
