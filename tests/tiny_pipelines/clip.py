"""A tiny CLIP text encoder and the tokenizer that belongs to it."""

from __future__ import annotations

from typing import TypeVar

from conftest import TEXT_LENGTH, make_clip_tokenizer
from transformers import CLIPTextConfig, CLIPTokenizer, PreTrainedModel

Encoder = TypeVar("Encoder", bound=PreTrainedModel)
WIDTH = 32


def build_clip(encoder: type[Encoder]) -> tuple[CLIPTokenizer, Encoder]:
    """A tokenizer of TEXT_LENGTH tokens, and an encoder of the given class, of two layers, WIDTH wide."""
    tokenizer = make_clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, encoder(config).eval()
