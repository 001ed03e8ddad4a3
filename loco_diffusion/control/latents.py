"""What most families have in common: latents of an AutoencoderKL, cut into square tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, unwrapped
from loco_diffusion.control.joint import JointCondition
from loco_diffusion.control.rows import Rows
from loco_diffusion.control.sampling import Sampling
from loco_diffusion.errors import UserError


class LatentFamily:
    """The part of a Family that most share; see there for shapes and ranges. What differs is overridden.

    Attributes:
        component: the pipeline's name of the denoiser.
        input_name: the denoiser's name of its input layer.
        tokenizer: the pipeline's name of the tokenizer that sets the length of prompts.
        numbers: entries of the denoiser's config that an adapter's weights depend on.
        patch: latents along the side of a token.
    """

    spatial = False
    flow = True
    linear_attention = False
    text_in_condition = False
    component: ClassVar[str] = "transformer"
    input_name: ClassVar[str]
    tokenizer: ClassVar[str] = "tokenizer"
    numbers: ClassVar[tuple[str, ...]] = ()
    patch: ClassVar[int] = 2

    def denoiser(self, pipe: Pipeline) -> nn.Module:
        model: nn.Module = unwrapped(getattr(pipe, self.component))
        return model

    def input_layer(self, denoiser: nn.Module) -> nn.Module:
        return denoiser.get_submodule(self.input_name)

    def guidance_copies(self, pipe: Pipeline) -> int:
        return 2 if getattr(pipe, "do_classifier_free_guidance", False) else 1

    def asks_one_half(self, arguments: Mapping[str, Any]) -> bool:
        return False

    @contextmanager
    def watched(self, pipe: Pipeline) -> Iterator[None]:
        """Pipelines remember the guidance of their last run, which does not count in this one."""
        before = getattr(pipe, "_guidance_scale", None)
        if before is not None:
            pipe._guidance_scale = 1.0
        try:
            yield
        finally:
            if before is not None:
                pipe._guidance_scale = before

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

    def encode_pictures(self, pipe: Pipeline, pictures: Tensor) -> Tensor:
        config = pipe.vae.config
        return (posterior_mode(pipe, pictures) - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def text_length(self, pipe: Pipeline) -> int:
        """The tokenizer's limit or the stock pipeline's default, the smaller one."""
        default: int = call_default(pipe, "max_sequence_length")
        tokenizer = getattr(pipe, self.tokenizer, None)
        return default if tokenizer is None else min(default, tokenizer.model_max_length)

    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        raise NotImplementedError

    def condition_text(self, pipe: Pipeline) -> dict[str, Tensor]:
        """The empty prompt.

        Raises:
            UserError: the pipeline has no text encoder.
        """
        check_text_encoders(pipe)
        return self.encode_prompts(pipe, [""])

    def decode_latents(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        config = pipe.vae.config
        return decoded(pipe, latents / config.scaling_factor + (config.get("shift_factor") or 0.0))

    def default_sampling(self, pipe: Pipeline) -> Sampling:
        """What the stock pipeline takes when its call does not say."""
        stock = {name: p.default for name, p in inspect.signature(type(pipe).__call__).parameters.items()}
        size = getattr(pipe, "default_sample_size", None) or getattr(pipe, self.component).config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        return Sampling(
            width=stock["width"] or columns * pipe.vae_scale_factor,
            height=stock["height"] or rows * pipe.vae_scale_factor,
            steps=stock["num_inference_steps"],
            guidance=stock["guidance_scale"],
        )

    def prompt_length(self, pipe: Pipeline, prompt: str) -> int:
        """By the tokenizer that reads most, which is the last one."""
        tokenizers = (getattr(pipe, name, None) for name in ("tokenizer_3", "tokenizer_2", "tokenizer"))
        tokenizer = next(tokenizer for tokenizer in tokenizers if tokenizer is not None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of text and pictures
        return len(tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def guidance_arguments(self, pipe: Pipeline, guidance: float, batch: int) -> dict[str, Any]:
        return {"guidance_scale": guidance, "negative_prompt": [""] * batch}

    def joint_forward(
        self, denoiser: nn.Module, conditions: Sequence[JointCondition], rows: Rows
    ) -> Callable[..., Any]:
        raise UserError(
            f"{type(denoiser).__name__} has no joint conditions, only FLUX.1 has; use TokensConfig(joint=False)."
        )


def check_text_encoders(pipe: Pipeline) -> None:
    """Raise UserError if the pipeline cannot encode the empty prompt."""
    if pipe.text_encoder is None or getattr(pipe, "text_encoder_2", pipe) is None:
        raise UserError(
            "The tokens route needs the text encoder, for the empty prompt; load the pipeline with it."
        )


@torch.no_grad()
def posterior_mode(pipe: Pipeline, pictures: Tensor) -> Tensor:
    """The VAE's own latents of pictures in [0, 1], float32, not normalised."""
    with _without_overflow(pipe.vae):
        # The pipeline's device and not the VAE's, which with offloading is elsewhere until it is called.
        scaled = (pictures * 2 - 1).to(pipe._execution_device, pipe.vae.dtype)
        latents: Tensor = pipe.vae.encode(scaled).latent_dist.mode()
    return latents.float()


@contextmanager
def _without_overflow(vae: Any) -> Iterator[None]:
    """In the block, a VAE computes in float32 if it would overflow in float16, as SDXL's does."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast")
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)


@torch.no_grad()
def decoded(pipe: Pipeline, latents: Tensor) -> Tensor:
    """Pictures, float32, about in [0, 1], of the VAE's own latents; undoes `posterior_mode`."""
    with _without_overflow(pipe.vae):
        pictures: Tensor = pipe.vae.decode(latents.to(pipe._execution_device, pipe.vae.dtype)).sample
    return pictures.float() / 2 + 0.5


def call_default(pipe: Pipeline, argument: str) -> Any:
    """What the pipeline's call takes where an argument is not given."""
    return inspect.signature(type(pipe).__call__).parameters[argument].default
