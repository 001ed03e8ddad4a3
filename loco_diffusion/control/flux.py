"""FLUX.1: pipelines around a FluxTransformer2DModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loco_diffusion.control.family import Pipeline, stack_rows, unwrapped
from loco_diffusion.control.flux_joint import JointFlux
from loco_diffusion.control.flux_positions import image_ids
from loco_diffusion.control.joint import JointCondition
from loco_diffusion.control.latents import LatentFamily
from loco_diffusion.control.rows import Rows
from loco_diffusion.control.sampling import Sampling


class FluxFamily(LatentFamily):
    """The Family of FLUX.1 models; see there for shapes and ranges.

    Attributes:
        embeddings: the denoiser's arguments for text, and their names in `encode_prompts`.
    """

    embeddings: ClassVar[dict[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "pooled_projections": "pooled_prompt_embeds",
    }
    tokenizer = "tokenizer_2"
    # Not guidance_embeds: an adapter trained on FLUX.1-dev also works on FLUX.1-schnell.
    input_name = "x_embedder"
    numbers: ClassVar[tuple[str, ...]] = (
        "in_channels",
        "num_layers",
        "num_single_layers",
        "num_attention_heads",
        "attention_head_dim",
        "joint_attention_dim",
        "pooled_projection_dim",
    )

    def __init__(self) -> None:
        self._grid: tuple[Tensor, tuple[int, int]] | None = None

    def self_attentions(self, denoiser: nn.Module) -> list[nn.Module]:
        model = unwrapped(denoiser)
        return [block.attn for block in (*model.transformer_blocks, *model.single_transformer_blocks)]

    def guidance_copies(self, pipe: Pipeline) -> int:
        return 1  # the two halves are calls of their own

    def token_channels(self, denoiser: nn.Module) -> int:
        return unwrapped(denoiser).config.in_channels  # the model takes packed tokens

    def grid(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        """The picture's tokens are those with 0 on the first axis."""
        ids = arguments.get("img_ids")
        if not isinstance(ids, Tensor):
            return None
        if self._grid is None or self._grid[0] is not ids:  # to read them waits for the device
            flat = ids.flatten(0, -2)
            rows, columns = (flat[flat[:, 0] == 0].amax(0)[1:3] + 1).tolist()
            self._grid = ids, (int(rows), int(columns))
        return self._grid[1]

    @torch.no_grad()
    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """prompt_embeds (B, L, D), pooled_prompt_embeds (B, P) and text_ids (L, 3)."""
        embeds, pooled, ids = pipe.encode_prompt(
            prompt=prompts, prompt_2=None, max_sequence_length=self.text_length(pipe)
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "text_ids": ids}

    def condition_text(self, pipe: Pipeline) -> dict[str, Tensor]:
        config, device = unwrapped(pipe.transformer).config, pipe._execution_device
        return {
            "prompt_embeds": torch.zeros(1, 0, config.joint_attention_dim, device=device),
            "pooled_prompt_embeds": torch.zeros(1, config.pooled_projection_dim, device=device),
            "text_ids": torch.zeros(0, 3, device=device),
        }

    def default_sampling(self, pipe: Pipeline) -> Sampling:
        """The stock pipeline's is FLUX.1-dev's; a model without embedded guidance is FLUX.1-schnell."""
        stock = super().default_sampling(pipe)
        distilled = unwrapped(pipe.transformer).config.guidance_embeds
        return stock if distilled else replace(stock, steps=4, guidance=1.0)

    def guidance_arguments(self, pipe: Pipeline, guidance: float, batch: int) -> dict[str, Any]:
        if unwrapped(pipe.transformer).config.guidance_embeds:
            return {"guidance_scale": guidance}
        return {"true_cfg_scale": guidance, "negative_prompt": [""] * batch}

    def joint_forward(
        self, denoiser: nn.Module, conditions: Sequence[JointCondition], rows: Rows
    ) -> Callable[..., Any]:
        return JointFlux(denoiser, conditions, rows).forward

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
        batch = len(latents)
        rows, columns = (side // self.patch for side in latents.shape[-2:])
        scale = None
        if model.config.guidance_embeds:
            scale = torch.full((batch,), 1.0 if guidance is None else guidance, device=latents.device)
        embeds = stack_rows({argument: text[name] for argument, name in self.embeddings.items()}, batch)
        velocity = denoiser(
            hidden_states=self.pack(latents).to(model.dtype),
            timestep=sigma.to(latents.device, model.dtype),  # the model itself multiplies by 1000
            guidance=scale,
            txt_ids=text["text_ids"],
            img_ids=image_ids(rows, columns, text["text_ids"], stride, text["text_ids"].shape[-1]),
            return_dict=False,
            **{argument: t.to(model.dtype) for argument, t in embeds.items()},
        )[0]
        return self.unpack(velocity, rows, columns)
