"""Recipe of the packaged base model: a Flux-shaped DiT and its text encoders, trained together on scenes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn

from loco_diffusion.control.flux import FluxFamily
from loco_diffusion.data.scenes import TRAIN_SEEDS, sample_scene
from loco_diffusion.embedded import lessons
from loco_diffusion.embedded.loop import half_precision, train
from loco_diffusion.embedded.text import build_text_encoders, build_tokenizers, share_capitals
from loco_diffusion.training.compilation import compile_blocks

# Of the times, in training and drawing alike (SD3, arXiv 2403.03206, section 5.3.2): where solids are to stand is
# decided while the 32 channels of latents are nearly all noise.
TIME_SHIFT = 3.0


def build_base(
    steps: int, vae: AutoencoderKL, runs: Path, device: str, compiled: bool = False
) -> FluxPipeline:
    """Train the transformer with its text encoders (or take them from their last checkpoint).

    Compiled, a step took 1.4 instead of 1.7 s on the two cores of an EPYC with AVX-512 BF16.
    """
    pipe = untrained_pipeline(vae.to(device))
    if compiled:
        compile_blocks(pipe.transformer)
    model = nn.ModuleDict(
        {
            "transformer": pipe.transformer.to(device),
            "text_encoder": pipe.text_encoder.to(device),
            "text_encoder_2": pipe.text_encoder_2.to(device),
            "layout": lessons.layout_head(FluxFamily().hidden_size(pipe.transformer)).to(device),
        }
    ).train()
    latents = lessons.scene_latents(pipe, runs)
    scenes = [sample_scene(seed) for seed in TRAIN_SEEDS[: lessons.SCENES]]
    layouts = lessons.scene_layouts(scenes, latents.shape[-1] // FluxFamily.patch)
    clip_ids, t5_ids = _tokens(pipe, [scene.caption for scene in scenes] + [""])
    inner = lessons.KeptOutput(pipe.transformer.single_transformer_blocks[0])

    def loss_of_step(step: int) -> torch.Tensor:
        chosen, told = lessons.batch_of_step(step)
        layout = layouts[chosen].to(device)
        with half_precision(device):
            text = _read(model, clip_ids[told].to(device), t5_ids[told].to(device))
            loss = _loss(model["transformer"], latents[chosen].to(device).float(), text, layout)
            told_layout = model["layout"](inner.output[1])  # of the picture's tokens
        return loss + lessons.LAYOUT_WEIGHT * lessons.layout_loss(told_layout, layout)

    train(runs / "base", model, lessons.optimizers(model, lr=2e-3), loss_of_step, steps)
    share_capitals(pipe.tokenizer_2, pipe.text_encoder_2)
    model.eval()
    return pipe


def untrained_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """The pipeline around `vae` with fresh text encoders and a fresh transformer of about 11 M parameters."""
    clip, t5 = build_tokenizers()
    text_encoder, text_encoder_2 = build_text_encoders(clip, t5)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=text_encoder_2.config.d_model,
        pooled_projection_dim=text_encoder.config.hidden_size,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    _start_at_identity(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5,
        transformer=transformer,
    )


def _start_at_identity(transformer: FluxTransformer2DModel) -> None:
    """Zero the modulations and the output layer (adaLN-Zero, DiT, arXiv 2212.09748 section 3.2)."""
    for name, module in transformer.named_modules():
        if name.endswith(
            ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
        ):
            if name.endswith("proj_out") and name != "proj_out":
                continue  # the single blocks' own output layers
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def _read(model: nn.ModuleDict, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "pooled_prompt_embeds": model["text_encoder"](clip_ids).pooler_output,
        "prompt_embeds": model["text_encoder_2"](t5_ids)[0],
        "text_ids": torch.zeros(t5_ids.shape[1], 3, device=t5_ids.device),
    }


def _loss(
    transformer: nn.Module, clean: torch.Tensor, text: dict[str, torch.Tensor], layouts: torch.Tensor
) -> torch.Tensor:
    """Flow matching (SD3, arXiv 2403.03206, equations 14 and 23) at the times that drawing takes.

    Logit-normal times, which are usual, hardly ever come near pure noise: one in 400 has sigma > .98, where drawing
    takes two of 20 steps and little but the caption tells what is to be drawn. Every batch covers all times.
    """
    noise = torch.randn_like(clean)
    sigma = (torch.arange(len(clean)) + torch.rand(len(clean))).to(clean.device) / len(clean)
    sigma = TIME_SHIFT * sigma / (1 + (TIME_SHIFT - 1) * sigma)
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
    velocity = FluxFamily().predict(transformer, mixed, sigma, text)
    return lessons.velocity_loss(velocity - (noise - clean), 1 - sigma, layouts)


def _tokens(pipe: FluxPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the captions for both encoders."""
    return lessons.token_ids(pipe.tokenizer, captions), lessons.token_ids(pipe.tokenizer_2, captions)
