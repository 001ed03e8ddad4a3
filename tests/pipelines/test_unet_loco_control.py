"""The custom pipelines of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from PIL import Image
from random_weights import randomise
from tiny_pipelines import sd, sdxl
from transformers import CLIPConfig, CLIPImageProcessor

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import EncoderConfig
from loco_diffusion.images import to_pil

FOLDER = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(FOLDER))
from sd_loco_control import StableDiffusionLoCOControlPipeline  # noqa: E402
from sdxl_loco_control import StableDiffusionXLLoCOControlPipeline  # noqa: E402


def build_sd_with_safety_checker() -> Any:
    """As published: what the checker sees it finds safe."""
    parts = sd.build().components
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**small, "image_size": 8, "patch_size": 4}, text_config=small, projection_dim=8
    )
    checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.fill_(2)  # thresholds above any cosine
    checker.special_care_embeds_weights.fill_(2)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    stock = StableDiffusionLoCOControlPipeline._stock()
    return stock(**parts | {"safety_checker": checker, "feature_extractor": processor})


class Case(NamedTuple):
    build: Callable[[], Any]
    controlled: Any
    file: str


CASES = {
    "sd": Case(sd.build, StableDiffusionLoCOControlPipeline, "sd_loco_control.py"),
    "sd, checked": Case(
        build_sd_with_safety_checker, StableDiffusionLoCOControlPipeline, "sd_loco_control.py"
    ),
    "sdxl": Case(sdxl.build, StableDiffusionXLLoCOControlPipeline, "sdxl_loco_control.py"),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def base(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stock pipeline's folder."""
    folder = tmp_path_factory.mktemp("base")
    case.build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    controller = Controller(case.build())
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2), encoder=EncoderConfig(hidden_size=8))
    randomise(controller, "canny")
    return controller.save_adapter(tmp_path_factory.mktemp("adapter") / "canny", "canny")


def edges(width: int = 64, height: int = 64) -> Image.Image:
    return to_pil(torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)).round())


def draw(pipe: Any, **arguments: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"} | arguments
    return pipe(arguments.pop("prompt", "a red cube"), **arguments).images


def test_it_equals_the_stock_pipeline_with_a_controller(case: Case, adapter: Path) -> None:
    stock = case.build()
    free = draw(stock)
    pipe = case.controlled.from_pipe(case.build())
    assert torch.equal(draw(pipe), free)
    pipe.load_control_adapter(adapter)
    assert torch.equal(draw(pipe), free)
    several = {"prompt": ["a", "b"], "num_images_per_prompt": 2, "height": 64, "width": 96}
    drawn = draw(pipe, control={"canny": [edges(96), edges(96)]}, control_strength=0.7, **several)
    controller = Controller(stock)
    controller.load_adapter(adapter)
    with controller(canny=[edges(96), edges(96)], strength=0.7):
        expected = draw(stock, **several)
    assert expected.shape == (4, 3, 64, 96) and torch.equal(drawn, expected)
    assert draw(pipe, control={"canny": edges(50, 41)}).shape == (1, 3, 40, 48)


def test_it_takes_all_that_the_stock_pipeline_takes(case: Case) -> None:
    stock = inspect.signature(case.controlled._stock().__call__).parameters
    ours = inspect.signature(case.controlled.__call__).parameters
    own = {"control", "control_strength", "control_start", "control_end"}
    assert set(ours) == {*stock, *own} and all(ours[name] == stock[name] for name in stock)
    steps: list[int] = []
    with pytest.warns(FutureWarning, match="callback"):  # an old argument, that has no name of its own
        draw(
            case.controlled.from_pipe(case.build()),
            callback=lambda step, *_: steps.append(step),
            callback_steps=1,
        )
    assert steps == [0, 1]


def load_class(case: Case, folder: Path) -> Any:
    return case.controlled.from_pretrained(folder)


def load_stock_and_convert(case: Case, folder: Path) -> Any:
    return case.controlled.from_pipe(DiffusionPipeline.from_pretrained(folder))


def load_custom(case: Case, folder: Path) -> Any:
    file = str(FOLDER / case.file)
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True)


@pytest.mark.parametrize("load", [load_class, load_stock_and_convert, load_custom])
def test_every_way_of_loading_and_saving(
    case: Case, base: Path, adapter: Path, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    pipe = load(case, base)
    pipe.load_control_adapter(adapter)
    expected = draw(pipe, control={"canny": edges()})
    assert not torch.equal(expected, draw(pipe))
    saved = tmp_path / "saved"
    pipe.save_pretrained(saved)
    index, original = (json.loads((folder / "model_index.json").read_text()) for folder in (saved, base))
    assert index == original
    files = [{p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (saved, base)]
    assert files[0] == files[1]
    for weights in base.rglob("*.safetensors"):
        assert (saved / weights.relative_to(base)).read_bytes() == weights.read_bytes()
    assert torch.equal(draw(pipe, control={"canny": edges()}), expected)  # saving has left it as it was
