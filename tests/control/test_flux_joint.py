"""FLUX.1 with condition tokens that see the picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from control_helpers import condition_map, draw, randomise
from diffusers import FluxPipeline
from torch import Tensor

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import EncoderConfig, TokensConfig, resize_map
from loco_diffusion.control.flux_positions import image_ids
from loco_diffusion.errors import UserError


@pytest.fixture
def controller(flux: FluxPipeline) -> Controller:
    """A controller with a trained-looking joint adapter "canny"."""
    return joint(Controller(flux), "canny")


def joint(controller: Controller, name: str, seed: int | None = 0, **tokens: Any) -> Controller:
    controller.add_adapter(name, LoCOConfig(r=2, num_rotations=2), tokens=TokensConfig(joint=True, **tokens))
    if seed is not None:
        randomise(controller, name, seed)
    return controller


def arguments(controller: Controller, pipe: FluxPipeline, batch: int, time: float) -> dict[str, Any]:
    text = controller.family.encode_prompts(pipe, ["a red cube"] * batch)
    tokens = torch.randn(batch, 4, 64, generator=torch.Generator().manual_seed(1))
    return {
        "hidden_states": tokens,
        "encoder_hidden_states": text["prompt_embeds"],
        "pooled_projections": text["pooled_prompt_embeds"],
        "timestep": torch.full((batch,), time),
        "img_ids": image_ids(2, 2, tokens, 1),
        "txt_ids": text["text_ids"],
        "return_dict": False,
    }


@torch.no_grad()
@pytest.mark.parametrize("stride", [1, 2])
def test_at_time_0_and_untrained_it_is_the_stock_model_on_all_tokens(flux: FluxPipeline, stride: int) -> None:
    controller = joint(Controller(flux), "canny", seed=None, stride=stride)
    given = arguments(controller, flux, 2, time=0.0)
    maps = condition_map(height=32 * stride, width=32 * stride)
    with controller(canny=maps):
        ours = flux.transformer(**given)[0]
    small = resize_map(maps, "canny", 32, 32)
    own = controller.family.pack(controller.family.encode_pictures(flux, small))
    given["hidden_states"] = torch.cat([given["hidden_states"], own.expand(2, -1, -1)], dim=1)
    given["img_ids"] = torch.cat([given["img_ids"], image_ids(2, 2, own, stride)])
    torch.testing.assert_close(ours, flux.transformer(**given)[0][:, :4], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_conditions_see_the_picture_but_not_each_other(flux: FluxPipeline, controller: Controller) -> None:
    joint(controller, "depth")
    stock = draw(flux)
    with controller(canny=condition_map()):
        one = draw(flux)
    with controller(canny=condition_map(), depth=condition_map()):
        both = draw(flux)
    with controller(canny=condition_map(), strength=2.0):
        torch.testing.assert_close(draw(flux), both, atol=1e-5, rtol=1e-5)
    assert all((a - b).abs().max() > 1e-3 for a, b in ((stock, one), (one, both)))
    with controller(canny=condition_map(), strength=1e-4):
        assert (draw(flux) - stock).norm() < 1e-2 * (one - stock).norm()
    assert torch.equal(draw(flux), stock) and "forward" not in vars(flux.transformer)


def test_gradients_with_and_without_checkpointing(flux: FluxPipeline, controller: Controller) -> None:
    parameters = controller.trainable_parameters("canny")["adapter"]
    given = arguments(controller, flux, 2, time=0.5)

    def gradients() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        with controller(canny=condition_map(batch=2), keep=torch.tensor([True, False])):
            flux.transformer(**given)[0].square().mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    expected = gradients()
    assert sum(bool(gradient.any()) for gradient in expected) > len(expected) / 2
    flux.transformer.enable_gradient_checkpointing()
    flux.transformer.train()
    torch.testing.assert_close(gradients(), expected, atol=1e-7, rtol=1e-4)


@torch.no_grad()
def test_a_dropped_row_is_the_stock_one(flux: FluxPipeline, controller: Controller) -> None:
    given = arguments(controller, flux, 2, time=0.5)
    stock = flux.transformer(**given)[0]
    with controller(canny=condition_map(batch=2), keep=torch.tensor([True, False])):
        mixed = flux.transformer(**given)[0]
    torch.testing.assert_close(mixed[1], stock[1], atol=1e-5, rtol=1e-5)
    assert (mixed[0] - stock[0]).abs().max() > 1e-3


@pytest.mark.parametrize("settings", [{"encoder": EncoderConfig(hidden_size=8)}, {"tokens": TokensConfig()}])
def test_other_conditions_beside_it_are_refused(controller: Controller, settings: dict[str, Any]) -> None:
    controller.add_adapter("depth", LoCOConfig(r=2), **settings)
    with pytest.raises(UserError, match="Joint conditions go with joint ones only"):
        controller(canny=condition_map(), depth=condition_map())
    with controller(canny=condition_map(), depth=condition_map(), strength={"depth": 0.0}):
        pass


@torch.no_grad()
def test_too_many_tokens_for_the_memory(flux: FluxPipeline, controller: Controller) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError

    stock = draw(flux)
    hook = flux.transformer.single_transformer_blocks[0].attn.norm_q.register_forward_hook(full)
    with (
        controller(canny=condition_map()),
        pytest.raises(UserError, match=r"20 tokens in each step, of which 4 .*stride=\.\.\."),
    ):
        draw(flux)
    hook.remove()
    assert torch.equal(draw(flux), stock)


def test_control_nets_are_refused(flux: FluxPipeline, controller: Controller) -> None:
    given = arguments(controller, flux, 1, time=0.5)
    with (
        controller(canny=condition_map()),
        pytest.raises(UserError, match="neither ControlNet nor IP-Adapter"),
    ):
        flux.transformer(**given, controlnet_block_samples=[torch.zeros(1, 4, 32)])
