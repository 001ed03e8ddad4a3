"""A tiny Stable Diffusion XL."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tiny_pipelines.clip import WIDTH, build_clip
from tiny_pipelines.parts import make_vae


def build() -> StableDiffusionXLPipeline:
    """Latents of 8 px, 12 text tokens, a block of two transformer layers."""
    time_width = 8
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=2 * WIDTH,
            attention_head_dim=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time_width,
            projection_class_embeddings_input_dim=6 * time_width + WIDTH,
            norm_num_groups=4,
        )
        tokenizer, text_encoder = build_clip(CLIPTextModel)
        tokenizer_2, text_encoder_2 = build_clip(CLIPTextModelWithProjection)
        vae = make_vae(4, scaling_factor=0.13025)
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="leading",
        steps_offset=1,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=unet.eval(),
        scheduler=scheduler,
        add_watermarker=False,
    )
