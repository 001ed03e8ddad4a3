"""Stable Diffusion 3 and 3.5: pipelines around an SD3Transformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, stack_rows, unwrapped
from loco_diffusion.control.latents import LatentFamily
from loco_diffusion.control.patch_positions import spread_patches

TIMESTEPS = 1000  # of training; the model counts time in them


class SD3Family(LatentFamily):
    """The Family of Stable Diffusion 3 models; see there for shapes and ranges."""

    tokenizer = "tokenizer_3"
    input_name = "pos_embed"
    numbers = (
        "in_channels",
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    )

    def self_attentions(self, denoiser: nn.Module) -> list[nn.Module]:
        """The joint ones, and those of SD3.5 that leave the text out."""
        blocks = unwrapped(denoiser).transformer_blocks
        return [attn for block in blocks for attn in (block.attn, block.attn2) if attn is not None]

    def asks_one_half(self, arguments: Mapping[str, Any]) -> bool:
        """Skip-layer guidance predicts the conditional half once more, without some of the layers."""
        return arguments.get("skip_layers") is not None

    @torch.no_grad()
    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, L, D), of CLIP and then T5, and pooled_prompt_embeds (B, P)."""
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.text_length(pipe),
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def condition_text(self, pipe: Pipeline) -> dict[str, Tensor]:
        config, device = unwrapped(pipe.transformer).config, pipe._execution_device
        return {
            "prompt_embeds": torch.zeros(1, 0, config.joint_attention_dim, device=device),
            "pooled_prompt_embeds": torch.zeros(1, config.pooled_projection_dim, device=device),
        }

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
        with spread_patches(model.pos_embed, latents, stride):
            velocity: Tensor = denoiser(
                hidden_states=latents.to(model.dtype),
                timestep=sigma.to(latents.device) * TIMESTEPS,
                encoder_hidden_states=embeds["prompt_embeds"].to(model.dtype),
                pooled_projections=embeds["pooled_prompt_embeds"].to(model.dtype),
                return_dict=False,
            )[0]
        return velocity
