"""A tiny PixArt-Sigma, and PixArt-alpha with its micro-conditions."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from tiny_pipelines.parts import make_t5, make_vae


def build() -> PixArtSigmaPipeline:
    """24 wide, two blocks, a learned variance; 12 text tokens, 16-px image tokens."""
    return PixArtSigmaPipeline(**_components())


def build_alpha() -> PixArtAlphaPipeline:
    """As for 1024 px: with micro-conditions."""
    return PixArtAlphaPipeline(**_components(sample_size=128))


def _components(sample_size: int = 8) -> dict[str, object]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel(
            sample_size=sample_size,
            num_layers=2,
            attention_head_dim=12,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            cross_attention_dim=24,
            caption_channels=32,
        )
        vae = make_vae(4)
        tokenizer, text_encoder = make_t5()
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "vae": vae,
        "transformer": transformer.eval(),
        "scheduler": DDIMScheduler(),
    }
