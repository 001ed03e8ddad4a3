"""A tiny Sana, and a tiny Sana-Sprint."""

from __future__ import annotations

import string
from typing import Any

import torch
from conftest import TEXT_LENGTH
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer


def build() -> SanaPipeline:
    """32 wide, two blocks, linear attention; 12 text tokens, 8-px image tokens."""
    return SanaPipeline(**_components(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def build_sprint() -> SanaSprintPipeline:
    """With embedded guidance."""
    return SanaSprintPipeline(**_components(guidance_embeds=True), scheduler=SCMScheduler())


def _components(guidance_embeds: bool = False) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SanaTransformer2DModel(
            sample_size=4,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=16,
            qk_norm="rms_norm_across_heads",
            guidance_embeds=guidance_embeds,
        )
        vae = AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            encoder_qkv_multiscales=((), (), (), (5,)),
            decoder_qkv_multiscales=((), (), (), (5,)),
            encoder_layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.41407,
        )
        tokenizer = _tokenizer()
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
            )
        )
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder.eval(),
        "vae": vae.eval(),
        "transformer": transformer.eval(),
    }


def _tokenizer() -> GemmaTokenizer:
    """One token a letter."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.ascii_lowercase]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return GemmaTokenizer(vocab=vocabulary, model_max_length=TEXT_LENGTH)
