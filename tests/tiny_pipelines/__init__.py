"""Tiny real pipelines of every family that can be controlled: the libraries' own classes, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiny:
    """A tiny pipeline.

    Attributes:
        name: of its family.
        build: makes it, evaluated, with the same weights on every call.
        side: in pixels, of a square picture of few tokens, at least 4 x 4.
        call: arguments that its call needs.
        guided: arguments that turn classifier-free guidance on.
        free: arguments that turn it off.
        text: where a prompt's tokens stand in self-attention: before or after the image's, or nowhere.
    """

    name: str
    build: Callable[[], Any]
    side: int
    call: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    text: Literal["before", "after", "nowhere"] = "nowhere"

    def draw(self, pipe: Any, prompt: str | list[str] = "a red cube", **arguments: Any) -> Tensor:
        """Two denoising steps, as latents, always from the same noise."""
        arguments = {
            "height": self.side,
            "width": self.side,
            "num_inference_steps": 2,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
            **self.call,
            **self.free,
        } | arguments
        if "negative_prompt" in arguments and not isinstance(prompt, str):
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(prompt)
        images: Tensor = pipe(prompt=prompt, **arguments).images
        return images


def _flux() -> Any:
    from conftest import build_flux_pipeline

    return build_flux_pipeline()


TINY = {
    tiny.name: tiny
    for tiny in (
        Tiny(
            "flux",
            _flux,
            side=64,
            call={"max_sequence_length": 12},
            guided={"negative_prompt": "", "true_cfg_scale": 3.0},
            text="before",
        ),
    )
}
