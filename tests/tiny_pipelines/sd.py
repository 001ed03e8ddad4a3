"""A tiny Stable Diffusion 1 or 2."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel

from tiny_pipelines.clip import WIDTH, build_clip
from tiny_pipelines.parts import make_vae


def build(version: int = 1) -> StableDiffusionPipeline:
    """Latents of 8 px, 12 text tokens; version 2 predicts v and has linear projections, as SD 2.1 does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2 if version == 1 else (1, 2),
            use_linear_projection=version == 2,
            norm_num_groups=4,
        )
        tokenizer, text_encoder = build_clip(CLIPTextModel)
        vae = make_vae(4, scaling_factor=0.18215)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon" if version == 1 else "v_prediction",
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
