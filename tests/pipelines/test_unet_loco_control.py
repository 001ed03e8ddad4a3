"""The custom pipelines of Stable Diffusion 1, 2 and XL: what their stock pipelines have and others have not."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from tiny_pipelines import TINY
from tiny_pipelines.controlled import random_maps, randomise
from transformers import CLIPConfig, CLIPImageProcessor

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import EncoderConfig

FOLDER = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(FOLDER))
from sd_loco_control import StableDiffusionLoCOControlPipeline  # noqa: E402
from sdxl_loco_control import StableDiffusionXLLoCOControlPipeline  # noqa: E402

CLASSES = {"sd": StableDiffusionLoCOControlPipeline, "sdxl": StableDiffusionXLLoCOControlPipeline}


def draw(pipe: Any, **arguments: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "output_type": "pt"} | arguments
    return pipe("a red cube", generator=torch.Generator().manual_seed(0), **arguments).images


@pytest.mark.parametrize("name", CLASSES)
def test_it_takes_all_that_the_stock_pipeline_takes(name: str) -> None:
    """Also the old arguments that have no names of their own."""
    stock = inspect.signature(CLASSES[name]._stock().__call__).parameters
    ours = inspect.signature(CLASSES[name].__call__).parameters
    assert all(ours[name] == stock[name] for name in stock) and "control_strength" in ours
    steps: list[int] = []
    pipe = CLASSES[name].from_pipe(TINY[name].build())
    with pytest.warns(FutureWarning, match="callback"):
        drawn = draw(pipe, callback=lambda step, *_: steps.append(step), callback_steps=1)
    assert steps == [0, 1] and torch.equal(drawn, draw(TINY[name].build()))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Stable Diffusion is published, with a safety checker; this one finds everything safe."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 8, "patch_size": 4}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=small, projection_dim=8)
    )
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        thresholds.fill_(2)  # above any cosine
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    parts = TINY["sd"].build().components | {"safety_checker": checker, "feature_extractor": processor}
    folder = tmp_path_factory.mktemp("published")
    StableDiffusionPipeline(**parts).save_pretrained(folder)
    return folder


def load_class(folder: Path) -> Any:
    return StableDiffusionLoCOControlPipeline.from_pretrained(folder)


def load_stock_and_convert(folder: Path) -> Any:
    return StableDiffusionLoCOControlPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(folder))


def load_custom(folder: Path) -> Any:
    file = str(FOLDER / "sd_loco_control.py")
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True)


@pytest.mark.parametrize("load", [load_class, load_stock_and_convert, load_custom])
@pytest.mark.parametrize("checked", [True, False])
def test_loading_and_saving_with_and_without_safety_checker(
    published: Path, load: Any, checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = published
    if not checked:
        base = tmp_path / "unchecked"
        TINY["sd"].build().save_pretrained(base)
    pipe = load(base)
    assert (pipe.safety_checker is not None) == pipe.config.requires_safety_checker == checked
    controller: Controller = pipe.controller
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2), encoder=EncoderConfig(hidden_size=8))
    randomise(controller, "canny")
    control = {"canny": random_maps(0, 1, 64, 64)}
    expected = draw(pipe, control=control)
    assert not torch.equal(expected, draw(pipe))

    saved = tmp_path / "saved"
    pipe.save_pretrained(saved)
    index, original = (json.loads((folder / "model_index.json").read_text()) for folder in (saved, base))
    assert index == original
    files = [{p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (saved, base)]
    assert files[0] == files[1]
    for weights in base.rglob("*.safetensors"):
        assert (saved / weights.relative_to(base)).read_bytes() == weights.read_bytes()
    assert torch.equal(draw(pipe, control=control), expected)  # saving has left it as it was
