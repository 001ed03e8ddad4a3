"""Models that also see pictures whose tokens follow those of the picture being drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from control_helpers import condition_map
from diffusers import FluxKontextPipeline
from tiny_pipelines import TINY
from tiny_pipelines.controlled import add, fresh, maps
from torch import Tensor

from loco_diffusion import Controller
from loco_diffusion.control.adapter import Route
from loco_diffusion.control.features import Features, FeatureSum
from loco_diffusion.control.rows import Rows
from loco_diffusion.errors import UserError
from loco_diffusion.images import to_pil

WITH_REFERENCES = ["flux", "flux2", "flux2_klein"]
REFERENCE = to_pil(condition_map(3, height=64, width=96)[0])


def build(name: str) -> Any:
    pipe = fresh(TINY[name])
    if name == "flux":
        pipe = FluxKontextPipeline(**pipe.components)
        pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(name: str, pipe: Any, **arguments: Any) -> Tensor:
    if name == "flux":
        arguments |= {"_auto_resize": False, "max_area": TINY[name].side ** 2}
    return TINY[name].draw(pipe, image=REFERENCE, **arguments)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_REFERENCES)
def test_the_condition_is_that_of_the_picture(name: str, route: Route) -> None:
    """Features are added to the tokens of the picture, and not to those of references."""
    tiny, pipe = TINY[name], build(name)
    stock = draw(name, pipe)
    controller = Controller(pipe)
    add(controller, route)
    embedded: list[Tensor] = []
    pipe.transformer.x_embedder.register_forward_hook(lambda module, args, output: embedded.append(output))
    assert torch.equal(draw(name, pipe), stock)
    with controller(canny=maps(tiny)):
        embedded_before = embedded[0]
        embedded.clear()
        assert not torch.equal(draw(name, pipe), stock)
    if route == "encoder":
        tokens = (tiny.side // controller.family.token_pixels(pipe)) ** 2
        added = embedded[0] - embedded_before
        assert added.shape[1] > tokens
        assert added[:, :tokens].any(2).all() and not added[:, tokens:].any()
        with controller(canny=maps(tiny, scale=(1, 2))), pytest.raises(UserError, match="picture's size"):
            draw(name, pipe)
    assert torch.equal(draw(name, pipe), stock)


@torch.no_grad()
def test_qwen_image_with_a_reference() -> None:
    """As its pipelines for editing call the denoiser."""
    tiny, pipe = TINY["qwenimage"], fresh(TINY["qwenimage"])
    tiny.settle(pipe)
    controller = Controller(pipe)
    add(controller, "encoder")
    text = controller.family.condition_text(pipe)
    tokens, reference = (torch.randn(1, n, 16, generator=torch.Generator().manual_seed(n)) for n in (16, 6))

    def predict(hidden: Tensor, shapes: list[tuple[int, int, int]]) -> Tensor:
        return pipe.transformer(
            hidden_states=hidden,
            timestep=torch.tensor([0.5]),
            encoder_hidden_states=text["prompt_embeds"],
            img_shapes=[shapes],
            return_dict=False,
        )[0]

    embedded: list[Tensor] = []
    pipe.transformer.img_in.register_forward_hook(lambda module, args, output: embedded.append(output))
    both, shapes = torch.cat([tokens, reference], dim=1), [(1, 4, 4), (1, 2, 3)]
    predict(both, shapes)
    with controller(canny=maps(tiny)):
        predict(both, shapes)
    with controller(canny=maps(tiny)):
        predict(tokens, shapes[:1])
    assert torch.equal(embedded[1][:, 16:], embedded[0][:, 16:])
    torch.testing.assert_close(embedded[1][:, :16], embedded[2])
    assert not torch.equal(embedded[1][:, :16], embedded[0][:, :16])


def test_a_compiled_denoiser_cannot_tell_references_from_the_picture() -> None:
    features = FeatureSum({"canny": Features(torch.zeros(1, 4, 8), (2, 2))}, 16, Rows(lambda: 1))
    with pytest.raises(UserError, match="do not compile the denoiser if there are reference pictures"):
        features.add(torch.zeros(1, 6, 8))
