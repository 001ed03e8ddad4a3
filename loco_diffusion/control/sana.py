"""Sana: pipelines around a SanaTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, stack_rows, unwrapped
from loco_diffusion.control.latents import LatentFamily, call_default
from loco_diffusion.control.patch_positions import spread_patches

TIMESTEPS = 1000  # of training; the model counts time in them


class SanaFamily(LatentFamily):
    """The Family of Sana models; see there for shapes and ranges."""

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
        embeds, mask, _, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            clean_caption=call_default(pipe, "clean_caption"),
            max_sequence_length=self.text_length(pipe),
            complex_human_instruction=call_default(pipe, "complex_human_instruction"),
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

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
        with spread_patches(model.patch_embed, latents, stride):
            velocity: Tensor = denoiser(
                latents.to(model.dtype),
                encoder_hidden_states=embeds["prompt_embeds"].to(model.dtype),
                encoder_attention_mask=embeds["prompt_attention_mask"],
                timestep=sigma.to(latents.device) * TIMESTEPS * model.config.timestep_scale,
                return_dict=False,
            )[0]
        return velocity
