"""Qwen-Image: pipelines around a QwenImageTransformer2DModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, stack_rows, unwrapped
from loco_diffusion.control.latents import (
    LatentFamily,
    call_default,
    check_text_encoders,
    decoded,
    posterior_mode,
)
from loco_diffusion.control.sampling import Sampling

MAX_TEXT_LENGTH = 512  # the default of the stock pipeline's call


class QwenImageFamily(LatentFamily):
    """The Family of Qwen-Image models; see there for shapes and ranges. Latents are without the VAE's time axis."""

    text_in_condition = True
    input_name = "img_in"
    numbers = (
        "in_channels",
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
    )

    def self_attentions(self, denoiser: nn.Module) -> list[nn.Module]:
        return [block.attn for block in unwrapped(denoiser).transformer_blocks]

    def guidance_copies(self, pipe: Pipeline) -> int:
        return 1  # the two halves are calls of their own

    def token_channels(self, denoiser: nn.Module) -> int:
        return unwrapped(denoiser).config.in_channels  # the model takes packed tokens

    def grid(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        shapes = arguments.get("img_shapes")
        if not shapes:
            return None
        _, rows, columns = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
        return rows, columns

    def encode_pictures(self, pipe: Pipeline, pictures: Tensor) -> Tensor:
        latents = posterior_mode(pipe, pictures.unsqueeze(2)).squeeze(2)
        mean, deviation = self._statistics(pipe, latents)
        return (latents - mean) / deviation

    def decode_latents(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(pipe, latents)
        return decoded(pipe, (latents * deviation + mean).unsqueeze(2)).squeeze(2)

    def _statistics(self, pipe: Pipeline, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, (C, 1, 1)."""
        config = pipe.vae.config
        mean, std = (like.new_tensor(t).view(-1, 1, 1) for t in (config.latents_mean, config.latents_std))
        return mean, std

    def default_sampling(self, pipe: Pipeline) -> Sampling:
        return replace(super().default_sampling(pipe), guidance=call_default(pipe, "true_cfg_scale"))

    def text_length(self, pipe: Pipeline) -> int:
        return min(MAX_TEXT_LENGTH, pipe.tokenizer_max_length)

    @torch.no_grad()
    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, L, D) and prompt_embeds_mask (B, L), False where a prompt is padded."""
        length = self.text_length(pipe)
        embeds, mask = pipe.encode_prompt(prompt=prompts, max_sequence_length=length)
        if mask is None:
            mask = torch.ones(embeds.shape[:2], device=embeds.device)
        missing = length - embeds.shape[1]
        return {
            "prompt_embeds": nn.functional.pad(embeds, (0, 0, 0, missing)),
            "prompt_embeds_mask": nn.functional.pad(mask.bool(), (0, missing)),
        }

    @torch.no_grad()
    def condition_text(self, pipe: Pipeline) -> dict[str, Tensor]:
        """Without padding, and so without a mask; raises as LatentFamily's."""
        check_text_encoders(pipe)
        embeds, _ = pipe.encode_prompt(prompt=[""])
        return {"prompt_embeds": embeds}

    def guidance_arguments(self, pipe: Pipeline, guidance: float, batch: int) -> dict[str, Any]:
        return {"true_cfg_scale": guidance, "negative_prompt": [""] * batch}

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None = None,
        stride: int = 1,
    ) -> Tensor:
        model = unwrapped(denoiser)
        rows, columns = (side // self.patch for side in latents.shape[-2:])
        text = stack_rows(text, len(latents))
        with _spread_rotations(model, stride):
            velocity = denoiser(
                hidden_states=self.pack(latents).to(model.dtype),
                timestep=sigma.to(latents.device, model.dtype),  # the model itself multiplies by 1000
                encoder_hidden_states=text["prompt_embeds"].to(model.dtype),
                encoder_hidden_states_mask=text.get("prompt_embeds_mask"),
                img_shapes=[[(1, rows, columns)]] * len(latents),
                return_dict=False,
            )[0]
        return self.unpack(velocity, rows, columns)


@contextmanager
def _spread_rotations(model: Any, stride: int) -> Iterator[None]:
    """In the block, image tokens have the positions that `Family.predict` says."""
    stock = model.pos_embed
    # Another module and not a hook: compiled models see that it is another one.
    model.pos_embed = _SpreadRotations(stock, stride) if stride > 1 else stock
    try:
        yield
    finally:
        model.pos_embed = stock


class _SpreadRotations(nn.Module):
    """Rotary positions of tokens that each stand for `stride` x `stride` of the picture's.

    Args:
        stock: the model's own, for whole positions.
        stride: along each side.
    """

    def __init__(self, stock: nn.Module, stride: int) -> None:
        super().__init__()
        self.stock = stock
        self.stride = stride

    def forward(
        self, shapes: list[list[tuple[int, int, int]]], max_txt_seq_len: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Rotations, complex, of image tokens (tokens, D) and, as for the whole picture, of text (L, D)."""
        _, rows, columns = shapes[0][0]
        sides = [(1, rows * self.stride, columns * self.stride)]
        image, text = self.stock([sides], max_txt_seq_len=max_txt_seq_len, device=device)
        image = image.unflatten(0, (rows, self.stride, columns, self.stride))
        # Half-way between two neighbours, or twice the same, lies the direction of their sum.
        low, high = (self.stride - 1) // 2, self.stride // 2
        image = image[:, low] + image[:, high]
        image = image[:, :, low] + image[:, :, high]
        return (image / image.abs()).flatten(0, 1), text
