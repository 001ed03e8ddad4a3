"""The custom pipeline: ways to load it, what it passes on, what it saves."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import resize_map
from loco_diffusion.errors import UserError
from loco_diffusion.images import to_pil

FILE = Path(__file__).parents[2] / "pipelines" / "flux_loco_control.py"
sys.path.insert(0, str(FILE.parent))
from flux_loco_control import FluxLoCOControlPipeline  # noqa: E402


@pytest.fixture(scope="module")
def adapter(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter with random weights."""
    controller = Controller(FluxPipeline.from_pretrained(flux_folder))
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2))
    generator = torch.Generator().manual_seed(0)
    for group in controller.trainable_parameters("canny").values():
        for parameter in group:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return controller.save_adapter(tmp_path_factory.mktemp("adapter") / "canny", "canny")


@pytest.fixture
def pipe(flux: FluxPipeline, adapter: Path) -> FluxLoCOControlPipeline:
    pipe = FluxLoCOControlPipeline.from_pipe(flux)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_control_adapter(adapter)
    return pipe


def edges(width: int = 32, height: int = 32) -> Image.Image:
    return to_pil(torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)).round())


def draw(pipe: DiffusionPipeline, **arguments: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    arguments = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"} | arguments
    return pipe(arguments.pop("prompt", "a red cube"), **arguments).images


def test_without_control_it_is_the_stock_pipeline(flux: FluxPipeline, pipe: FluxLoCOControlPipeline) -> None:
    stock = draw(flux, height=32, width=32, max_sequence_length=12)
    assert torch.equal(draw(pipe, height=32, width=32), stock)
    assert torch.equal(draw(pipe, control={}, height=32, width=32), stock)
    assert torch.equal(draw(pipe, control={"canny": edges()}, control_strength=0.0), stock)
    controlled = draw(pipe, control={"canny": edges()})
    assert controlled.shape == (1, 3, 32, 32) and not torch.equal(controlled, stock)
    assert not torch.equal(
        draw(pipe, control={"canny": edges()}, control_strength={"canny": 0.5}), controlled
    )
    assert torch.equal(draw(pipe, height=32, width=32), stock)


def test_it_equals_the_controller(flux: FluxPipeline, pipe: FluxLoCOControlPipeline, adapter: Path) -> None:
    guidance = {"negative_prompt": ["", ""], "true_cfg_scale": 2.0}
    arguments = {"num_images_per_prompt": 2, "prompt": ["a", "b"]} | guidance
    expected = draw(pipe, control={"canny": [edges(), edges()]}, control_strength=0.7, **arguments)
    assert expected.shape == (4, 3, 32, 32)
    pipe.controller.delete_adapter("canny")
    controller = Controller(flux)
    controller.load_adapter(adapter)
    with controller(canny=edges(), strength=0.7):
        stock = draw(flux, height=32, width=32, max_sequence_length=12, **arguments)
    assert torch.equal(stock, expected)


def test_every_argument_of_the_stock_pipeline_is_there() -> None:
    stock = inspect.signature(FluxPipeline.__call__).parameters
    ours = inspect.signature(FluxLoCOControlPipeline.__call__).parameters
    own = {"control", "control_strength", "control_start", "control_end"}
    assert set(ours) == {*stock, *own}
    assert all(ours[name] == stock[name] for name in stock)


def test_size_follows_the_map_and_the_map_the_size(pipe: FluxLoCOControlPipeline) -> None:
    assert draw(pipe, control={"canny": edges(48, 32)}).shape == (1, 3, 32, 48)
    assert draw(pipe, control={"canny": edges(50, 40)}).shape == (1, 3, 32, 48)
    assert draw(pipe, control={"canny": edges(5, 5)}).shape == (1, 3, 16, 16)
    small = torch.zeros(1, 3, 16, 16)
    small[..., 3] = 1
    resized = draw(pipe, control={"canny": small}, height=32, width=48)
    assert resized.shape == (1, 3, 32, 48)
    assert torch.equal(draw(pipe, control={"canny": resize_map(small, "canny", 32, 48)}), resized)
    assert draw(pipe, control={"canny": edges(32, 32)}, height=64).shape == (1, 3, 64, 32)
    assert draw(pipe, control={"canny": edges(32, 32)}, height=40).shape == (1, 3, 32, 32)


def test_outputs_and_callbacks_are_the_stock_ones(pipe: FluxLoCOControlPipeline) -> None:
    steps = []

    def callback(pipe: DiffusionPipeline, step: int, timestep: int, tensors: dict) -> dict:
        steps.append((step, sorted(tensors)))
        return tensors

    images = draw(pipe, control={"canny": edges()}, output_type="pil", callback_on_step_end=callback)
    assert isinstance(images[0], Image.Image) and steps == [(0, ["latents"]), (1, ["latents"])]
    outcome = pipe(
        "a", control={"canny": edges()}, num_inference_steps=1, return_dict=False, output_type="np"
    )
    assert outcome[0].shape == (1, 32, 32, 3)
    latents = torch.randn(1, 4, 64)
    assert draw(pipe, control={"canny": edges()}, latents=latents, output_type="latent").shape == (1, 4, 64)


def test_a_prompt_of_any_length_is_taken(pipe: FluxLoCOControlPipeline) -> None:
    for prompt in ("", "a very long prompt " * 50):
        assert torch.isfinite(draw(pipe, prompt=prompt, control={"canny": edges()})).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control": {"depth": edges()}}, "no adapter 'depth'; loaded are canny"),
        ({"control": {"canny": "edges.png"}}, "PIL picture"),
        ({"control": {"canny": edges()}, "control_strength": {"depth": 1.0}}, "strength for 'depth'"),
        ({"control": {"canny": [edges(), edges()]}}, "2 condition maps for 1 pictures"),
    ],
)
def test_unusable_control_is_refused(pipe: FluxLoCOControlPipeline, arguments: dict, message: str) -> None:
    stock = draw(pipe, height=32, width=32)
    with pytest.raises(UserError, match=message):
        draw(pipe, **arguments)
    assert torch.equal(draw(pipe, height=32, width=32), stock)


def load_class(folder: Path) -> DiffusionPipeline:
    return FluxLoCOControlPipeline.from_pretrained(folder)


def load_stock_and_convert(folder: Path) -> DiffusionPipeline:
    return FluxLoCOControlPipeline.from_pipe(FluxPipeline.from_pretrained(folder))


def load_custom(folder: Path) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(FILE), trust_remote_code=True)


@pytest.mark.parametrize("load", [load_class, load_stock_and_convert, load_custom])
def test_every_way_of_loading_and_saving(
    pipe: FluxLoCOControlPipeline,
    flux_folder: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    load: object,
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected = draw(pipe, control={"canny": edges()})
    loaded = load(flux_folder)  # type: ignore[operator]
    loaded.set_progress_bar_config(disable=True)
    assert loaded.components.keys() == FluxPipeline.from_pretrained(flux_folder).components.keys()
    assert loaded.load_control_adapter(str(adapter)) == "canny"
    assert torch.equal(draw(loaded, control={"canny": edges()}), expected)

    loaded.save_pretrained(tmp_path / "saved")
    index = "model_index.json"
    assert json.loads((tmp_path / "saved" / index).read_text()) == json.loads(
        (flux_folder / index).read_text()
    )
    files = [
        {p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (tmp_path / "saved", flux_folder)
    ]
    assert files[0] == files[1]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "saved" / weights).read_bytes() == (flux_folder / weights).read_bytes()
    assert torch.equal(draw(loaded, control={"canny": edges()}), expected)  # saving has left it as it was
    loaded.controller.fuse("canny")
    with pytest.raises(UserError, match="'canny' is fused"):
        loaded.save_pretrained(tmp_path / "fused")


def test_a_pipeline_without_denoiser_still_loads_and_saves(flux_folder: Path, tmp_path: Path) -> None:
    pipe = FluxLoCOControlPipeline.from_pretrained(flux_folder, transformer=None, vae=None)
    assert pipe.encode_prompt("a red cube", None, max_sequence_length=12)[0].shape == (1, 12, 32)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="FluxLoCOControlPipeline cannot be controlled"):
        pipe.load_control_adapter(tmp_path)
