"""Sana: pipelines around a SanaTransformer2DModel."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, stack_rows, unwrapped
from loco_diffusion.control.latents import LatentFamily, call_default
from loco_diffusion.control.patch_positions import spread_patches

TIMESTEPS = 1000  # of training; the model counts time in them


class SanaFamily(LatentFamily):
    """The Family of Sana models; see there for shapes and ranges.

    Sana-Sprint, which has embedded guidance, also counts time from 0 to 1.
    """

    linear_attention = True
    patch = 1
    input_name = "patch_embed"
    numbers = (
        "in_channels",
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "cross_attention_dim",
        "caption_channels",
    )

    def self_attentions(self, denoiser: nn.Module) -> list[nn.Module]:
        return [block.attn1 for block in unwrapped(denoiser).transformer_blocks]

    @torch.no_grad()
    def encode_pictures(self, pipe: Pipeline, pictures: Tensor) -> Tensor:
        """Its autoencoder has no posterior, only latents."""
        vae = pipe.vae
        scaled = (pictures * 2 - 1).to(pipe._execution_device, vae.dtype)
        latents: Tensor = vae.encode(scaled).latent.float()
        return latents * vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, L, D), under the stock pipeline's instruction to the language model, and
        prompt_attention_mask (B, L), 1 where there is a token."""
        known = inspect.signature(pipe.encode_prompt).parameters  # Sana-Sprint has no unconditional half
        guided = {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in known else {}
        embeds, mask, *_ = pipe.encode_prompt(
            prompts,
            clean_caption=call_default(pipe, "clean_caption"),
            max_sequence_length=self.text_length(pipe),
            complex_human_instruction=call_default(pipe, "complex_human_instruction"),
            **guided,
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def guidance_arguments(self, pipe: Pipeline, guidance: float, batch: int) -> dict[str, Any]:
        if _is_distilled(pipe.transformer):
            return {"guidance_scale": guidance}
        return super().guidance_arguments(pipe, guidance, batch)

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
        embeds = stack_rows(text, len(latents))
        time, scale = sigma.to(latents.device), None
        if _is_distilled(model):
            scale = torch.full_like(time, 1.0 if guidance is None else guidance, dtype=model.dtype)
            scale = scale * model.config.guidance_embeds_scale
        else:
            time = time * TIMESTEPS * model.config.timestep_scale
        with spread_patches(model.patch_embed, latents, stride):
            velocity: Tensor = denoiser(
                latents.to(model.dtype),
                encoder_hidden_states=embeds["prompt_embeds"].to(model.dtype),
                encoder_attention_mask=embeds["prompt_attention_mask"],
                guidance=scale,
                timestep=time,
                return_dict=False,
            )[0]
        return velocity


def _is_distilled(denoiser: Any) -> bool:
    """Whether the model is a Sana-Sprint."""
    distilled: bool = unwrapped(denoiser).config.guidance_embeds
    return distilled
