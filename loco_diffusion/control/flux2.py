"""FLUX.2: pipelines around a Flux2Transformer2DModel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, unwrapped
from loco_diffusion.control.flux import FluxFamily
from loco_diffusion.control.latents import LatentFamily, decoded, posterior_mode
from loco_diffusion.control.sampling import Sampling


class Flux2Family(FluxFamily):
    """The Family of FLUX.2 models; see there for shapes and ranges.

    Latents are those of 2 x 2 places of the VAE together, because that is how they are normalised.
    """

    embeddings = {"encoder_hidden_states": "prompt_embeds"}
    numbers = (
        "in_channels",
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
    )
    patch = 1
    joint_forward = LatentFamily.joint_forward  # there is none

    def token_pixels(self, pipe: Pipeline) -> int:
        return pipe.vae_scale_factor * 2

    def encode_pictures(self, pipe: Pipeline, pictures: Tensor) -> Tensor:
        latents = nn.functional.pixel_unshuffle(posterior_mode(pipe, pictures), 2)
        mean, deviation = self._statistics(pipe, latents)
        return (latents - mean) / deviation

    def decode_latents(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        mean, deviation = self._statistics(pipe, latents)
        return decoded(pipe, nn.functional.pixel_shuffle(latents * deviation + mean, 2))

    def _statistics(self, pipe: Pipeline, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, (C, 1, 1)."""
        norm = pipe.vae.bn
        mean, variance = (t.float().view(-1, 1, 1).to(like) for t in (norm.running_mean, norm.running_var))
        return mean, (variance + pipe.vae.config.batch_norm_eps).sqrt()

    def default_sampling(self, pipe: Pipeline) -> Sampling:
        return LatentFamily.default_sampling(self, pipe)

    def text_length(self, pipe: Pipeline) -> int:
        return pipe.tokenizer_max_length

    @torch.no_grad()
    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, L, D) and text_ids (L, 4)."""
        embeds, ids = pipe.encode_prompt(prompt=prompts, max_sequence_length=self.text_length(pipe))
        return {"prompt_embeds": embeds, "text_ids": ids[0].float()}  # as image tokens' may be fractions

    def condition_text(self, pipe: Pipeline) -> dict[str, Tensor]:
        width, device = unwrapped(pipe.transformer).config.joint_attention_dim, pipe._execution_device
        return {
            "prompt_embeds": torch.zeros(1, 0, width, device=device),
            "text_ids": torch.zeros(0, 4, device=device),
        }

    def guidance_arguments(self, pipe: Pipeline, guidance: float, batch: int) -> dict[str, Any]:
        return {"guidance_scale": guidance}  # its negative prompt, where it has one, is always empty
