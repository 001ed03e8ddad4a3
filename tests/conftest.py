"""A tiny real FLUX pipeline: the libraries' own classes at toy sizes, random weights, no hub."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Tiny models gain nothing from threads, and with several of them equal sums may differ in the last bit.
torch.set_num_threads(1)

TEXT_LENGTH = 12
pytest_plugins = ["tiny_pipelines.fixtures"]


def build_flux_pipeline(num_layers: int = 1, guidance_embeds: bool = False) -> FluxPipeline:
    """A FluxPipeline, 32 wide, 12 text tokens, 16-px image tokens; the same weights on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=num_layers,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=16,
            norm_num_groups=4,
            layers_per_block=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        )
        clip_tokenizer = _clip_tokenizer()
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TEXT_LENGTH,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
            )
        )
        t5_tokenizer = _t5_tokenizer()
        text_encoder_2 = T5EncoderModel(
            T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
        )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2.eval(),
        tokenizer_2=t5_tokenizer,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)


def _t5_tokenizer() -> T5Tokenizer:
    tokens = ["<pad>", "</s>", "<unk>", "\u2581", *_LETTERS]
    vocabulary = [(token, 0.0 if token.startswith("<") else -1.0) for token in tokens]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=TEXT_LENGTH)


@pytest.fixture(scope="session")
def make_flux() -> Callable[..., FluxPipeline]:
    """A function that gives a pipeline of its own to a test; see `build_flux_pipeline` for its arguments."""
    built: dict[tuple[int, bool], FluxPipeline] = {}

    def make(num_layers: int = 1, guidance_embeds: bool = False) -> FluxPipeline:
        key = (num_layers, guidance_embeds)
        if key not in built:
            built[key] = build_flux_pipeline(num_layers, guidance_embeds)
        return copy.deepcopy(built[key])

    return make


@pytest.fixture
def flux(make_flux: Callable[..., FluxPipeline]) -> FluxPipeline:
    """A tiny FLUX pipeline that the test may change."""
    return make_flux()


@pytest.fixture(scope="session")
def flux_folder(make_flux: Callable[..., FluxPipeline], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline saved in diffusers' format; read only."""
    folder = tmp_path_factory.mktemp("flux")
    make_flux().save_pretrained(folder)
    return folder
