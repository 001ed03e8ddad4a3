"""Tiny real pipelines of every family that can be controlled: the libraries' own classes, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
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
        unread: layers of the denoiser whose output it drops.
        text: where a prompt's tokens stand in self-attention: before or after the image's, or nowhere.
        settings: attributes of the pipeline that a new one made of its parts has not.
        start: the shape of a picture as the call takes it under `latents`; default: that of its result.
    """

    name: str
    build: Callable[[], Any]
    side: int
    call: dict[str, Any] = field(default_factory=dict)
    guided: dict[str, Any] = field(default_factory=dict)
    free: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    text: Literal["before", "after", "nowhere"] = "nowhere"
    settings: dict[str, Any] = field(default_factory=dict)
    start: tuple[int, ...] | None = None

    def settle(self, pipe: Any) -> None:
        """Give a pipeline the settings."""
        for name, value in self.settings.items():
            setattr(pipe, name, value)

    def draw(self, pipe: Any, prompt: str | list[str] = "a red cube", **arguments: Any) -> Tensor:
        """Two denoising steps, as latents, always from the same noise."""
        self.settle(pipe)
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


def _build(family: str) -> Callable[[], Any]:
    """The `build` of a module of this package, which is imported when it is needed."""
    return lambda: import_module(f"{__name__}.{family}").build()


_GUIDED = {"negative_prompt": "", "guidance_scale": 3.0}
_FREE = {"guidance_scale": 1.0}

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
        Tiny(
            "flux2",
            _build("flux2"),
            side=16,
            call={"max_sequence_length": 12},
            guided={"guidance_scale": 3.0},
            free={"guidance_scale": 1.0},
            text="before",
            start=(16, 4, 4),
        ),
        Tiny(
            "flux2_klein",
            _build("flux2_klein"),
            side=16,
            call={"max_sequence_length": 12},
            guided={"guidance_scale": 3.0},
            free={"guidance_scale": 1.0},
            text="before",
            start=(16, 4, 4),
        ),
        Tiny(
            "qwenimage",
            _build("qwenimage"),
            side=16,
            call={"max_sequence_length": 12},
            guided={"negative_prompt": "", "true_cfg_scale": 3.0},
            free={"true_cfg_scale": 1.0},
            settings={
                "prompt_template_encode": "<|im_start|>{}<|im_end|>",
                "prompt_template_encode_start_idx": 1,
            },
            unread=("transformer_blocks.1.attn.add_q_proj", "transformer_blocks.1.attn.to_add_out"),
            text="before",
        ),
        Tiny(
            "sd3",
            _build("sd3"),
            side=64,
            call={"max_sequence_length": 12},
            guided={"negative_prompt": "", "guidance_scale": 3.0},
            free={"guidance_scale": 1.0},
            unread=("transformer_blocks.1.attn.add_q_proj",),  # the last block makes no text
            text="after",
        ),
        Tiny(
            "pixart",
            _build("pixart"),
            side=64,
            call={"max_sequence_length": 12, "use_resolution_binning": False},
            guided={"guidance_scale": 3.0},
            free={"guidance_scale": 1.0},
        ),
        Tiny(
            "sana",
            _build("sana"),
            side=32,
            call={"max_sequence_length": 12, "use_resolution_binning": False},
            guided={"guidance_scale": 3.0},
            free={"guidance_scale": 1.0},
        ),
        Tiny("sd", _build("sd"), side=64, guided=_GUIDED, free=_FREE),
        Tiny("sdxl", _build("sdxl"), side=64, guided=_GUIDED, free=_FREE),
    )
}
"""One for each family, and for those of its pipelines that guide in another way."""

DENOISERS = {name: tiny for name, tiny in TINY.items() if name not in ("sdxl", "flux2_klein")}
"""Without those whose denoiser has only parts that Stable Diffusion's and FLUX.2's have."""

STRUCTURES = {name: TINY[name] for name in ("flux", "sana", "sd")}
"""A transformer in which text and picture attend together, one with linear attention, and a UNet."""

PIPELINES = TINY | {
    "pixart_alpha": replace(
        TINY["pixart"],
        name="pixart_alpha",
        build=lambda: import_module(f"{__name__}.pixart").build_alpha(),
    )
}
"""One for each file in `pipelines/`."""
