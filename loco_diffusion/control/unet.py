"""Stable Diffusion 1, 2 and XL: pipelines around a UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, stack_rows, unwrapped
from loco_diffusion.control.latents import LatentFamily
from loco_diffusion.errors import UserError

TRAINING_TIMESTEPS = 1000  # of every such model


class UNetFamily(LatentFamily):
    """The Family of Stable Diffusion models; see there for shapes and ranges."""

    spatial = True
    flow = False
    component = "unet"
    input_name = "conv_in"
    numbers = ("in_channels", "cross_attention_dim")
    patch = 1

    def self_attentions(self, denoiser: nn.Module) -> list[nn.Module]:
        modules = unwrapped(denoiser).modules()
        return [module.attn1 for module in modules if isinstance(module, BasicTransformerBlock)]

    def hidden_size(self, denoiser: nn.Module) -> int:
        return unwrapped(denoiser).config.block_out_channels[0]

    def token_channels(self, denoiser: nn.Module) -> int:
        return unwrapped(denoiser).config.out_channels  # inpainting models read more than the latents

    def base_numbers(self, pipe: Pipeline) -> dict[str, int]:
        unet = self.denoiser(pipe)
        sizes = {"hidden_size": self.hidden_size(unet), "self_attentions": len(self.self_attentions(unet))}
        return super().base_numbers(pipe) | sizes

    def text_length(self, pipe: Pipeline) -> int:
        return pipe.tokenizer.model_max_length

    @torch.no_grad()
    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, L, D); for SDXL also pooled_prompt_embeds (B, P) and latent_pixels (B, 1), the side
        in pixels of a latent, from which `predict` tells the model the picture's size.

        For the empty prompt SDXL's pipeline can take zeros instead; with these, adapters of cross-attentions would
        do nothing in a condition's pass.
        """
        device = pipe._execution_device
        embeds, _, *pooled = pipe.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if not pooled:
            return {"prompt_embeds": embeds}
        pixels = torch.full((len(prompts), 1), float(pipe.vae_scale_factor), device=device)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled[0], "latent_pixels": pixels}

    def guidance_arguments(self, pipe: Pipeline, guidance: float, batch: int) -> dict[str, Any]:
        return {"guidance_scale": guidance}  # the pipeline knows what its model takes for no prompt

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None = None,
        stride: int = 1,
    ) -> Tensor:
        """See Family; nothing is known of positions, so that `stride` changes nothing.

        Raises:
            UserError: the model reads more than latents.
        """
        model = unwrapped(denoiser)
        if latents.shape[1] != model.config.in_channels:
            raise UserError(
                f"This UNet reads {model.config.in_channels} channels and not {latents.shape[1]} (an inpainting "
                "model?); use the encoder route for it, or a text-to-image model."
            )
        rows = {name: tensor.to(model.dtype) for name, tensor in stack_rows(text, len(latents)).items()}
        prediction: Tensor = denoiser(
            latents.to(model.dtype),
            sigma.to(latents.device) * TRAINING_TIMESTEPS,
            encoder_hidden_states=rows["prompt_embeds"],
            added_cond_kwargs=_size_and_pooled(latents, rows),
            return_dict=False,
        )[0]
        return prediction


def _size_and_pooled(latents: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """What SDXL is told besides the prompt: a picture of the latents' size, not cropped (arXiv 2307.01952)."""
    if "latent_pixels" not in rows:
        return None
    height, width = (side * rows["latent_pixels"] for side in latents.shape[-2:])
    uncropped = torch.zeros_like(height)
    ids = torch.cat([height, width, uncropped, uncropped, height, width], dim=1)
    return {"text_embeds": rows["pooled_prompt_embeds"], "time_ids": ids}
