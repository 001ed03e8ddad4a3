"""The custom pipelines of SD3, PixArt and Sana: what they add to the stock ones, and that it is no more."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_pipelines import TINY, Tiny
from torch import Tensor

from loco_diffusion import LoCOConfig
from loco_diffusion.control import ControlledPipeline, EncoderConfig, TokensConfig
from loco_diffusion.errors import UserError

FOLDER = Path(__file__).parents[2] / "pipelines"
sys.path.insert(0, str(FOLDER))
from pixart_loco_control import PixArtLoCOControlPipeline  # noqa: E402
from sana_loco_control import SanaLoCOControlPipeline  # noqa: E402
from sd3_loco_control import SD3LoCOControlPipeline  # noqa: E402

CLASSES: dict[str, Any] = {
    "sd3": SD3LoCOControlPipeline,
    "pixart": PixArtLoCOControlPipeline,
    "sana": SanaLoCOControlPipeline,
}
_built: dict[str, Any] = {}


@pytest.fixture(params=CLASSES)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return TINY[request.param]


@pytest.fixture
def stock(tiny: Tiny) -> Any:
    if tiny.name not in _built:
        _built[tiny.name] = tiny.build()
        _built[tiny.name].set_progress_bar_config(disable=True)
    return copy.deepcopy(_built[tiny.name])


@pytest.fixture
def pipe(tiny: Tiny, stock: Any) -> Any:
    pipe = CLASSES[tiny.name].from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    add_adapters(pipe)
    return pipe


def add_adapters(pipe: Any) -> None:
    config = LoCOConfig(r=2, num_rotations=2)
    pipe.controller.add_adapter("canny", config, encoder=EncoderConfig(hidden_size=8))
    pipe.controller.add_adapter("depth", config, tokens=TokensConfig())
    generator = torch.Generator().manual_seed(0)
    for name in ("canny", "depth"):
        for group in pipe.controller.trainable_parameters(name).values():
            for parameter in group:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def edges(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def draw(pipe: Any, **arguments: Any) -> Tensor:
    """At the size of the map, and without resolution bins where there is one."""
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)} | arguments
    images: Tensor = pipe("a red cube", output_type="pt", **arguments).images
    return images


def test_without_control_it_is_the_stock_pipeline(tiny: Tiny, stock: Any, pipe: Any) -> None:
    expected = tiny.draw(stock)
    assert torch.equal(tiny.draw(pipe), expected)
    control = {"canny": edges(tiny.side, tiny.side), "depth": edges(tiny.side, tiny.side)}
    assert torch.equal(tiny.draw(pipe, control=control, control_strength=0.0), expected)
    drawn = [tiny.draw(pipe, control={name: map}) for name, map in control.items()]
    assert not any(torch.equal(picture, expected) for picture in drawn)
    assert torch.equal(tiny.draw(pipe), expected)


def test_the_picture_has_the_size_of_the_map(tiny: Tiny, pipe: Any) -> None:
    control = {"canny": edges(tiny.side, 2 * tiny.side)}
    assert draw(pipe, control=control).shape == (1, 3, tiny.side, 2 * tiny.side)
    control = {"canny": edges(2 * tiny.side + 1, tiny.side + 1), "depth": edges(8, 8)}
    assert draw(pipe, control=control).shape == (1, 3, 2 * tiny.side, tiny.side)


@pytest.mark.parametrize("tiny", [TINY["pixart"], TINY["sana"]], ids=lambda tiny: tiny.name)
def test_resolution_bins_are_off_with_maps_only(tiny: Tiny, pipe: Any) -> None:
    """The tiny models' training size is one that the stock pipelines have no bins for."""
    control = {"canny": edges(tiny.side, tiny.side)}
    assert torch.equal(draw(pipe, control=control, use_resolution_binning=False), draw(pipe, control=control))
    for arguments in ({"control": control, "use_resolution_binning": True}, {"control": {}}):
        with pytest.raises(ValueError, match="Invalid sample size"):
            draw(pipe, **arguments)


def test_every_argument_of_the_stock_pipeline_is_there(pipe: Any, stock: Any) -> None:
    theirs = inspect.signature(type(stock).__call__).parameters
    ours = inspect.signature(type(pipe).__call__).parameters
    own = {"control", "control_strength", "control_start", "control_end"}
    assert set(ours) == {*theirs, *own} and all(ours[name] == theirs[name] for name in theirs)
    with pytest.raises(UserError, match="no adapter 'mask'"):
        pipe("a", control={"mask": edges(8, 8)})


def test_loading_and_saving(
    tiny: Tiny, stock: Any, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    control = {"canny": edges(tiny.side, tiny.side), "depth": edges(tiny.side, tiny.side)}
    expected = draw(pipe, control=control)
    for name in control:
        pipe.controller.save_adapter(tmp_path / name, name)
    pipe.save_pretrained(tmp_path / "pipe")
    custom = str(FOLDER / f"{tiny.name}_loco_control.py")
    loaded = DiffusionPipeline.from_pretrained(
        tmp_path / "pipe", custom_pipeline=custom, trust_remote_code=True
    )
    assert isinstance(loaded, ControlledPipeline) and loaded.components.keys() == stock.components.keys()
    loaded.set_progress_bar_config(disable=True)
    for name in control:
        assert loaded.load_control_adapter(tmp_path / name) == name
    assert torch.equal(draw(loaded, control=control), expected)
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "pipe")) is type(stock)
