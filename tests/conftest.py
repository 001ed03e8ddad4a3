"""Tiny real pipelines, adapters for them, and what runs commands: the libraries' own classes, no hub."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.cli import main
from loco_diffusion.control import EncoderConfig
from loco_diffusion.training.config import TrainingConfig, make_config

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
        clip_tokenizer = make_clip_tokenizer()
        text_encoder = _clip_text_encoder(clip_tokenizer)
        t5_tokenizer = make_t5_tokenizer()
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


def make_clip_tokenizer() -> CLIPTokenizer:
    tokens = ["<|startoftext|>", "<|endoftext|>", *_LETTERS, *(f"{letter}</w>" for letter in _LETTERS)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)


def _clip_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_t5_tokenizer() -> T5Tokenizer:
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


@pytest.fixture(scope="session")
def built_stable_diffusion() -> StableDiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = make_clip_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=8,
            norm_num_groups=4,
        )
        return StableDiffusionPipeline(
            vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1).eval(),
            text_encoder=_clip_text_encoder(tokenizer).eval(),
            tokenizer=tokenizer,
            unet=unet.eval(),
            scheduler=DDIMScheduler(clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


@pytest.fixture
def stable_diffusion(built_stable_diffusion: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A tiny Stable Diffusion pipeline, 16 channels wide, that the test may change."""
    return copy.deepcopy(built_stable_diffusion)


@pytest.fixture(scope="session")
def adapters(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters of random weights for canny and deblur."""
    folder = tmp_path_factory.mktemp("adapters")
    controller = Controller(FluxPipeline.from_pretrained(flux_folder))
    for seed, name in enumerate(("canny", "deblur")):
        controller.add_adapter(name, LoCOConfig(r=1, num_rotations=2), encoder=EncoderConfig(hidden_size=8))
        generator = torch.Generator().manual_seed(seed)
        for parameters in controller.trainable_parameters(name).values():
            for parameter in parameters:
                parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        controller.save_adapter(folder / name, name)
    return folder


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    picture = Image.radial_gradient("L").resize((80, 60)).point(lambda value: 255 * (value > 90))
    picture.convert("RGB").save(path)
    return path


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def failure(capfd: pytest.CaptureFixture[str], workplace: Path) -> Callable[..., str]:
    """A function that runs a failing command and gives its one line; it must leave no file behind."""

    def run(*arguments: object) -> str:
        before = sorted(workplace.rglob("*"))
        assert main([str(argument) for argument in arguments]) == 2
        captured = capfd.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("Error: ") and captured.err.count("\n") == 1, captured.err
        assert sorted(workplace.rglob("*")) == before
        return captured.err

    return run


def small_config(base: Path, output: Path, /, **fields: Any) -> TrainingConfig:
    """A small training, with changed fields."""
    defaults = {
        "condition": "canny",
        "output": str(output),
        "base": str(base),
        "data": {"source": "scenes", "count": 5, "size": 32},
        "encoder": {"hidden_size": 16},
        "adapter": {"options": {"r": 1, "num_rotations": 2}},
        "steps": 4,
        "batch_size": 2,
    }
    return make_config({**defaults, **fields})


@pytest.fixture
def make(flux_folder: Path, tmp_path: Path) -> Any:
    """A function that makes a small configuration of a training, with changed fields."""

    def config(output: str = "run", **fields: Any) -> TrainingConfig:
        defaults = {
            "checkpoint_every": 1,
            "keep_checkpoints": 9,
            "log_every": 2,
            "validation": {"pictures": 0},
        }
        return small_config(flux_folder, tmp_path / output, **{**defaults, **fields})

    return config
