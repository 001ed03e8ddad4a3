"""What FLUX.2 has of its own agrees with the stock pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from control_helpers import condition_map
from diffusers import Flux2Pipeline
from tiny_pipelines import TINY

from loco_diffusion.control import family_of
from loco_diffusion.control.flux2 import Flux2Family

FAMILY = Flux2Family()


@pytest.fixture(scope="module", params=["flux2", "flux2_klein"])
def pipe(request: pytest.FixtureRequest) -> Any:
    """Read only."""
    return TINY[request.param].build()


def test_latents_and_tokens_are_the_pipelines_own(pipe: Any) -> None:
    pictures = condition_map(batch=2, height=16, width=24)
    latents = FAMILY.encode_pictures(pipe, pictures)
    with torch.no_grad():
        torch.testing.assert_close(latents, pipe._encode_vae_image(pictures * 2 - 1, None))
    assert latents.shape == (2, 16, 4, 6)
    assert torch.equal(FAMILY.pack(latents), Flux2Pipeline._pack_latents(latents))


def test_the_grid_is_read_from_four_axes() -> None:
    ids = Flux2Pipeline._prepare_latent_ids(torch.zeros(2, 1, 4, 6))
    assert FAMILY.grid({"img_ids": ids}) == FAMILY.grid({"img_ids": ids[0]}) == (4, 6)


@torch.no_grad()
def test_a_token_may_stand_for_several(pipe: Any) -> None:
    """Positions of a stride of 2 are halves, with any text."""
    ids: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda m, args, kwargs: ids.append(kwargs["img_ids"]), with_kwargs=True
    )
    for text in (FAMILY.encode_prompts(pipe, ["a"]), FAMILY.condition_text(pipe)):
        FAMILY.predict(pipe.transformer, torch.zeros(1, 16, 1, 2), torch.zeros(1), text, stride=2)
    hook.remove()
    assert ids[0].tolist() == ids[1].tolist() == [[0, 0.5, 0.5, 0], [0, 0.5, 2.5, 0]]


def test_facts(pipe: Any) -> None:
    assert isinstance(family_of(pipe), Flux2Family)
    assert FAMILY.token_pixels(pipe) == 4 and FAMILY.token_channels(pipe.transformer) == 16
    text = FAMILY.encode_prompts(pipe, ["a", "a very long prompt " * 20])
    assert text["prompt_embeds"].shape == (2, 12, 24) and text["text_ids"].shape == (12, 4)
    assert FAMILY.condition_text(pipe)["prompt_embeds"].shape == (1, 0, 24)
    assert len(FAMILY.self_attentions(pipe.transformer)) == 2
