"""The tokens route: what its strength means, and what is kept of a condition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from control_helpers import condition_map, draw, randomise
from diffusers import FluxPipeline
from torch import Tensor

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import CacheSettings, EncoderConfig, TokensConfig
from loco_diffusion.errors import UserError


def add_tokens(controller: Controller, name: str, seed: int = 0) -> None:
    controller.add_adapter(name, LoCOConfig(r=2, num_rotations=2), tokens=TokensConfig())
    randomise(controller, name, seed)


@pytest.fixture
def controller(flux: FluxPipeline) -> Controller:
    """A controller with a trained-looking adapter "canny"."""
    controller = Controller(flux)
    add_tokens(controller, "canny")
    return controller


@torch.no_grad()
def test_twice_the_attention_to_one_is_one_attention_to_each_of_two(
    flux: FluxPipeline, controller: Controller
) -> None:
    add_tokens(controller, "depth")
    with controller(canny=condition_map(), strength=2.0):
        twice = draw(flux)
    with controller(canny=condition_map(), depth=condition_map()):
        torch.testing.assert_close(draw(flux), twice, atol=1e-5, rtol=1e-5)


def test_the_condition_pass_is_made_once(flux: FluxPipeline, controller: Controller) -> None:
    passes, picture = [], condition_map()
    flux.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: passes.append(kwargs["encoder_hidden_states"].shape[1] == 0), with_kwargs=True
    )

    def condition_passes(image: Tensor = picture, **given: Any) -> int:
        passes.clear()
        with controller(canny=image, **given):
            draw(flux, height=image.shape[-2])
        return sum(passes)

    assert condition_passes() == condition_passes() == 1  # what is trained gets a graph each time
    parameters = controller.trainable_parameters("canny")["adapter"]
    for parameter in parameters:
        parameter.requires_grad_(False)
    assert condition_passes() == 1
    assert condition_passes() == condition_passes(strength=0.5) == 0
    parameters[0].mul_(2)
    assert condition_passes() == 1 and condition_passes() == 0
    for other in (condition_map(seed=1), condition_map(height=64)):
        assert condition_passes(other) == 1 and condition_passes(other) == 0
    assert condition_passes() == 1
    controller.clear_cache()
    assert controller.cache_nbytes == 0 and condition_passes() == 1


@torch.no_grad()
@pytest.mark.parametrize("cache", [CacheSettings(dtype=torch.bfloat16), CacheSettings(device="cpu")])
def test_keys_and_values_elsewhere(flux: FluxPipeline, controller: Controller, cache: CacheSettings) -> None:
    with controller(canny=condition_map()):
        expected = draw(flux)
        size = controller.cache_nbytes
    controller.delete_adapter("canny")
    other = Controller(flux, cache)
    add_tokens(other, "canny")
    with other(canny=condition_map()):
        torch.testing.assert_close(draw(flux), expected, atol=0.02, rtol=0.02)
    assert other.cache_nbytes == (size // 2 if cache.dtype else size) > 0


def test_what_the_route_cannot_do_is_refused(controller: Controller) -> None:
    with pytest.raises(UserError, match="no strength below 0"):
        controller(canny=condition_map(), strength=-1.0)
    with pytest.raises(UserError, match="leave it unfused"):
        controller.fuse("canny")
    with pytest.raises(UserError, match="settings for both routes"):
        controller.add_adapter("depth", LoCOConfig(), encoder=EncoderConfig(), tokens=TokensConfig())
    with pytest.raises(UserError, match="stride must be a whole number"):
        TokensConfig(stride=0)
    for window in ({"start": 0.5, "end": 0.5}, {"end": 1.5}, {"start": {"canny": -1.0}}):
        with pytest.raises(UserError, match="0 <= start < end <= 1"):
            controller(canny=condition_map(), **window)
    with pytest.raises(UserError, match="start or end for 'depth' but no map"):
        controller(canny=condition_map(), start={"depth": 0.5})


def test_saved_and_loaded(flux: FluxPipeline, controller: Controller, tmp_path: Any) -> None:
    with controller(canny=condition_map()):
        expected = draw(flux)
    folder = controller.save_adapter(tmp_path / "canny", "canny")
    controller.delete_adapter("canny")
    assert not (folder / "control_encoder.safetensors").exists()
    assert controller.load_adapter(folder) == "canny"
    assert controller.adapters["canny"].route == "tokens"
    with controller(canny=condition_map()):
        assert torch.equal(draw(flux), expected)
