"""What Qwen-Image has of its own agrees with the stock pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from control_helpers import condition_map, randomise
from diffusers import QwenImagePipeline
from tiny_pipelines import TINY

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import TokensConfig
from loco_diffusion.control.family import spread_positions
from loco_diffusion.control.qwenimage import QwenImageFamily, _spread_rotations

FAMILY = QwenImageFamily()
QWEN = TINY["qwenimage"]


@pytest.fixture
def pipe() -> Any:
    pipe = QWEN.build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlled(pipe: Any, stride: int = 1) -> Controller:
    """With a trained-looking adapter "canny" of the tokens route."""
    controller = Controller(pipe)
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2), tokens=TokensConfig(stride))
    randomise(controller, "canny")
    return controller


def test_latents_and_tokens_are_the_pipelines_own(pipe: Any) -> None:
    pictures = condition_map(batch=2, height=16, width=24)
    latents = FAMILY.encode_pictures(pipe, pictures)
    assert latents.shape == (2, 4, 8, 12)
    mode = pipe.vae.encode(pictures[:, :, None] * 2 - 1).latent_dist.mode()[:, :, 0]
    mean, std = (
        torch.tensor(t).view(-1, 1, 1) for t in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    torch.testing.assert_close(latents * std + mean, mode)  # as the pipeline decodes
    packed = QwenImagePipeline._pack_latents(latents.unsqueeze(1), 2, 4, 8, 12)
    assert torch.equal(FAMILY.pack(latents), packed)


def test_the_grid_is_read_from_shapes() -> None:
    assert FAMILY.grid({"img_shapes": [[(1, 4, 6)], [(1, 4, 6)]]}) == (4, 6)
    assert FAMILY.grid({"img_shapes": [(1, 4, 6)]}) == (4, 6) and FAMILY.grid({}) is None


def test_prompts_are_padded_and_the_padding_is_masked(pipe: Any) -> None:
    text = FAMILY.encode_prompts(pipe, ["a", "a very long prompt " * 20])
    assert text["prompt_embeds"].shape == (2, 12, 16)
    assert text["prompt_embeds_mask"].sum(1).tolist() == [2, 12]  # the template has a token after the prompt
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (
            FAMILY.predict(pipe.transformer, latents, torch.ones(1), own)
            for own in (FAMILY.encode_prompts(pipe, [""]), FAMILY.condition_text(pipe))
        )
    torch.testing.assert_close(one, two)


@torch.no_grad()
def test_prompts_of_several_lengths_have_their_own_conditions(pipe: Any) -> None:
    controller = controlled(pipe)
    prompts, images = ["a cone", "a blue cone"], condition_map(batch=2, height=16, width=16)
    noise = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    with controller(canny=images):
        together = QWEN.draw(pipe, prompts, latents=noise, **QWEN.guided)
    for row in range(2):
        with controller(canny=images[row, None]):
            alone = QWEN.draw(pipe, prompts[row], latents=noise[row, None], **QWEN.guided)
        torch.testing.assert_close(together[row, None], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("grid", [(2, 3), (3, 1)])
def test_positions_are_spread_over_the_whole_picture(pipe: Any, stride: int, grid: tuple[int, int]) -> None:
    rope, (rows, columns) = pipe.transformer.pos_embed, grid
    whole = (rows * stride, columns * stride)
    with _spread_rotations(pipe.transformer, stride):
        image, text = pipe.transformer.pos_embed(
            [[(1, *grid)]], max_txt_seq_len=5, device=torch.device("cpu")
        )
    assert pipe.transformer.pos_embed is rope
    # Positions are counted from the middle of the picture; text follows where the longer side ends.
    axes = [
        spread_positions(side, stride, torch.device("cpu")) - (side * stride - side * stride // 2)
        for side in grid
    ]
    down, right = (rope.rope_params(axis, 6, rope.theta) for axis in axes)
    expected = torch.cat(
        [
            torch.ones(rows * columns, 2),
            down.repeat_interleave(columns, 0),
            right.repeat(rows, 1),
        ],
        dim=1,
    )
    torch.testing.assert_close(image, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(text, rope.pos_freqs[max(whole) // 2 :][:5])


@torch.no_grad()
def test_a_compiled_model_sees_other_positions(pipe: Any) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = FAMILY.condition_text(pipe)

    def predictions() -> list[torch.Tensor]:
        return [FAMILY.predict(pipe.transformer, latents, torch.ones(1), text, stride=s) for s in (1, 2, 1)]

    expected = predictions()
    assert not torch.allclose(expected[0], expected[1])
    torch._dynamo.reset()
    pipe.transformer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(predictions(), expected)
    torch._dynamo.reset()


@torch.no_grad()
def test_the_empty_prompt_is_encoded_once(pipe: Any) -> None:
    calls: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    controller = controlled(pipe, stride=2)
    for seed in range(3):
        with controller(canny=condition_map(seed, height=16, width=16)):
            pass
    assert len(calls) == 1
    controller.clear_cache()
    with controller(canny=condition_map(0, height=16, width=16)):
        assert len(calls) == 2
