"""What most families have in common: latents of an AutoencoderKL, cut into square tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, unwrapped

_EMPTY_PROMPTS: WeakKeyDictionary[Pipeline, dict[str, Tensor]] = WeakKeyDictionary()


class LatentFamily:
    """The part of a Family that most share; see there for shapes and ranges. What differs is overridden.

    Attributes:
        component: the pipeline's name of the denoiser.
        tokenizer: the pipeline's name of the tokenizer that sets the length of prompts.
        numbers: entries of the denoiser's config that an adapter's weights depend on.
        patch: latents along the side of a token.
    """

    spatial = False
    flow = True
    linear_attention = False
    text_in_condition = False
    component: ClassVar[str] = "transformer"
    tokenizer: ClassVar[str] = "tokenizer"
    numbers: ClassVar[tuple[str, ...]] = ()
    patch: ClassVar[int] = 2

    def denoiser(self, pipe: Pipeline) -> nn.Module:
        model: nn.Module = unwrapped(getattr(pipe, self.component))
        return model

    def guidance_copies(self, pipe: Pipeline) -> int:
        return 2 if getattr(pipe, "do_classifier_free_guidance", False) else 1

    def watched(self, pipe: Pipeline) -> AbstractContextManager[None]:
        return nullcontext()

    def hidden_size(self, denoiser: nn.Module) -> int:
        config = unwrapped(denoiser).config
        return config.num_attention_heads * config.attention_head_dim

    def token_channels(self, denoiser: nn.Module) -> int:
        return unwrapped(denoiser).config.in_channels * self.patch**2

    def token_pixels(self, pipe: Pipeline) -> int:
        return pipe.vae_scale_factor * self.patch

    def base_numbers(self, pipe: Pipeline) -> dict[str, int]:
        config = unwrapped(getattr(pipe, self.component)).config
        return {name: config[name] for name in self.numbers} | {"token_pixels": self.token_pixels(pipe)}

    def grid(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        latents = arguments.get("hidden_states")
        if not isinstance(latents, Tensor) or latents.ndim != 4:
            return None
        return latents.shape[2] // self.patch, latents.shape[3] // self.patch

    def pack(self, latents: Tensor) -> Tensor:
        return nn.functional.pixel_unshuffle(latents, self.patch).flatten(2).mT

    def unpack(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (rows, columns)), self.patch)

    @torch.no_grad()
    def encode_pictures(self, pipe: Pipeline, pictures: Tensor) -> Tensor:
        vae = pipe.vae
        # The pipeline's device and not the VAE's, which with offloading is elsewhere until it is called.
        scaled = (pictures * 2 - 1).to(pipe._execution_device, vae.dtype)
        latents = vae.encode(scaled).latent_dist.mode().float()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def text_length(self, pipe: Pipeline) -> int:
        """The tokenizer's limit or the stock pipeline's default, the smaller one."""
        default: int = call_default(pipe, "max_sequence_length")
        tokenizer = getattr(pipe, self.tokenizer, None)
        return default if tokenizer is None else min(default, tokenizer.model_max_length)

    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def condition_text(self, pipe: Pipeline) -> dict[str, Tensor]:
        """The empty prompt, encoded once for a pipeline: training asks for it in every step."""
        if pipe not in _EMPTY_PROMPTS:
            with torch.inference_mode(False):  # what is kept must serve training, too
                _EMPTY_PROMPTS[pipe] = self.encode_prompts(pipe, [""])
        return {name: t.to(pipe._execution_device) for name, t in _EMPTY_PROMPTS[pipe].items()}

    def guidance_arguments(self, pipe: Pipeline, guidance: float, batch: int) -> dict[str, Any]:
        return {"guidance_scale": guidance, "negative_prompt": [""] * batch}


def call_default(pipe: Pipeline, argument: str) -> Any:
    """What the pipeline's call takes where an argument is not given."""
    return inspect.signature(type(pipe).__call__).parameters[argument].default
