"""A tiny FLUX.2 pipeline: 32 wide, 12 text tokens, 4-px image tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
)

from tiny_pipelines.letters import letter_tokenizer, user_template

TEXT_LENGTH = 12


def build() -> Flux2Pipeline:
    """With embedded guidance; text is read from layers 10, 20 and 30 of Mistral 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = letter_tokenizer()
        pipe = Flux2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=make_vae(),
            text_encoder=Mistral3ForConditionalGeneration(
                Mistral3Config(
                    text_config=MistralConfig(
                        num_hidden_layers=30, head_dim=4, **text_config(len(tokenizer))
                    ),
                    vision_config=PixtralVisionConfig(
                        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
                    ),
                    image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
                )
            ).eval(),
            tokenizer=PixtralProcessor(
                PixtralImageProcessor(), tokenizer, chat_template=user_template("message.content[0].text")
            ),
            transformer=make_transformer(guidance_embeds=True),
        )
    pipe.tokenizer_max_length = TEXT_LENGTH
    return pipe


def make_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    ).eval()


def make_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def text_config(vocabulary: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
