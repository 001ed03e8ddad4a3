"""Parts that several tiny pipelines have."""

from __future__ import annotations

from typing import Any

from conftest import TEXT_LENGTH, make_t5_tokenizer
from diffusers import AutoencoderKL
from transformers import T5Config, T5EncoderModel, T5Tokenizer


def make_vae(latent_channels: int, **config: Any) -> AutoencoderKL:
    """A VAE with 8 pixels to a latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=latent_channels,
        norm_num_groups=4,
        layers_per_block=1,
        **config,
    ).eval()


def make_t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """A tokenizer and its encoder, 32 wide, 12 tokens."""
    tokenizer = make_t5_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    assert tokenizer.model_max_length == TEXT_LENGTH
    return tokenizer, T5EncoderModel(config).eval()
