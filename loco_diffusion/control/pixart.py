"""PixArt-alpha and PixArt-Sigma: pipelines around a PixArtTransformer2DModel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, stack_rows, unwrapped
from loco_diffusion.control.latents import LatentFamily, call_default
from loco_diffusion.control.patch_positions import spread_patches

LATENT_PIXELS = 8  # side of a latent of the VAE that all PixArt models have


class PixArtFamily(LatentFamily):
    """The Family of PixArt models; see there for shapes and ranges."""

    flow = False
    input_name = "pos_embed"
    numbers = (
        "in_channels",
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "cross_attention_dim",
        "caption_channels",
    )

    def __init__(self) -> None:
        self._copies = 1

    def self_attentions(self, denoiser: nn.Module) -> list[nn.Module]:
        return [block.attn1 for block in unwrapped(denoiser).transformer_blocks]

    def guidance_copies(self, pipe: Pipeline) -> int:
        return self._copies

    @contextmanager
    def watched(self, pipe: Pipeline) -> Iterator[None]:
        """Pipelines of PixArt keep their guidance scale to themselves, but each run encodes its prompts first,
        and no negative ones where it has no guidance."""
        encode_prompt = pipe.encode_prompt

        @wraps(encode_prompt)
        def noted(*args: Any, **kwargs: Any) -> Any:
            encoded = encode_prompt(*args, **kwargs)
            self._copies = 1 if encoded[2] is None else 2
            return encoded

        pipe.encode_prompt = noted
        try:
            yield
        finally:
            del pipe.encode_prompt
            self._copies = 1

    @torch.no_grad()
    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, L, D) and prompt_attention_mask (B, L), 1 where a token is part of the prompt."""
        embeds, mask, _, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            clean_caption=call_default(pipe, "clean_caption"),
            max_sequence_length=self.text_length(pipe),
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
        with spread_patches(model.pos_embed, latents, stride):
            noise: Tensor = denoiser(
                latents.to(model.dtype),
                encoder_hidden_states=embeds["prompt_embeds"].to(model.dtype),
                encoder_attention_mask=embeds["prompt_attention_mask"],
                timestep=sigma.to(latents.device) * model.config.num_embeds_ada_norm,
                added_cond_kwargs=_size(model, latents, stride),
                return_dict=False,
            )[0]
        return noise[:, : latents.shape[1]]  # the rest is a variance, which no stock scheduler reads


def _size(model: Any, latents: Tensor, stride: int) -> dict[str, Tensor | None]:
    """The micro-conditions of PixArt-alpha at 1024 px: the picture's height and width, and their ratio."""
    if not model.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    height, width = (side * LATENT_PIXELS * stride for side in latents.shape[-2:])
    sizes = latents.new_tensor([[height, width, height / width]], dtype=model.dtype).expand(len(latents), 3)
    return {"resolution": sizes[:, :2], "aspect_ratio": sizes[:, 2:]}
