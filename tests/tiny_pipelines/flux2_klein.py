"""A tiny FLUX.2 klein pipeline: as FLUX.2's, with another text encoder and classifier-free guidance."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from transformers import Qwen3Config, Qwen3ForCausalLM

from tiny_pipelines.flux2 import TEXT_LENGTH, make_transformer, make_vae, text_config
from tiny_pipelines.letters import letter_tokenizer, user_template


def build() -> Flux2KleinPipeline:
    """Text is read from layers 9, 18 and 27 of Qwen 3."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = letter_tokenizer(user_template("message.content"))
        config = Qwen3Config(num_hidden_layers=27, head_dim=4, **text_config(len(tokenizer)))
        pipe = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=make_vae(),
            text_encoder=Qwen3ForCausalLM(config).eval(),
            tokenizer=tokenizer,
            transformer=make_transformer(guidance_embeds=False),
        )
    pipe.tokenizer_max_length = TEXT_LENGTH
    return pipe
