"""A tiny Qwen-Image pipeline: 32 wide, up to 12 text tokens, 4-px image tokens."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tiny_pipelines import TINY
from tiny_pipelines.letters import letter_tokenizer

TEXT_LENGTH = 12


def build() -> QwenImagePipeline:
    """With a shorter prompt template than the real one's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = letter_tokenizer()
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[-0.5, 0.0, 0.5, 1.0],
            latents_std=[0.5, 1.0, 1.5, 2.0],
        )
        text_encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "bos_token_id": None,
                    "eos_token_id": None,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": 16,
                    "intermediate_size": 16,
                    "num_heads": 1,
                    "out_hidden_size": 16,
                },
            )
        )
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )
    pipe.tokenizer_max_length = TEXT_LENGTH
    TINY["qwenimage"].settle(pipe)
    return pipe
