"""SD3, PixArt and Sana: what the toolkit does by itself agrees with the stock pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from control_helpers import condition_map, randomise
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from tiny_pipelines import TINY
from tiny_pipelines.controlled import add, fresh, maps
from tiny_pipelines.pixart import build_alpha
from tiny_pipelines.sana import build_sprint
from torch import Tensor

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import TokensConfig, family_of
from loco_diffusion.control.adapter import Route
from loco_diffusion.control.patch_positions import spread_patches
from loco_diffusion.errors import UserError

BUILD: dict[str, Callable[[], Any]] = {name: TINY[name].build for name in ("sd3", "pixart", "sana")}
BUILD["pixart alpha"] = build_alpha


def call(name: str) -> dict[str, Any]:
    tiny = TINY[name.split()[0]]
    return tiny.call | tiny.free


def first_prediction(pipe: Any, prompt: str, **arguments: Any) -> tuple[Tensor, Tensor]:
    """What the stock pipeline's first step gets and what it makes of it: latents, and what is predicted."""
    seen: list[Tensor] = []
    step = pipe.scheduler.step

    def noted(prediction: Tensor, time: Any, latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.extend((latents, prediction))
        return step(prediction, time, latents, *args, **kwargs)

    pipe.scheduler.step = noted
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pipe(prompt, num_inference_steps=2, generator=generator, output_type="latent", **arguments)
    del pipe.scheduler.step
    return seen[0], seen[1]


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_predict_is_what_the_pipeline_computes(name: str, dtype: torch.dtype) -> None:
    """At a size that is neither square nor the training size, for a prompt with padding."""
    pipe = BUILD[name]().to(dtype=dtype)
    family = family_of(pipe)
    latents, expected = first_prediction(pipe, "cat", height=64, width=96, **call(name))
    if family.flow:
        time = pipe.scheduler.sigmas[:1]
    else:
        time = pipe.scheduler.timesteps[:1] / pipe.scheduler.config.num_train_timesteps
    text = family.encode_prompts(pipe, ["cat"])
    predicted = family.predict(family.denoiser(pipe), latents, time, text)
    assert predicted.shape == latents.shape
    torch.testing.assert_close(predicted, expected.to(dtype), rtol=1e-5, atol=1e-5)
    other = family.predict(family.denoiser(pipe), latents, time, family.encode_prompts(pipe, ["a dog"]))
    assert not torch.equal(other, predicted)


@pytest.mark.parametrize("name", BUILD)
def test_pictures_are_encoded_as_the_pipeline_decodes(name: str) -> None:
    pipe = BUILD[name]()
    pictures = condition_map(batch=2, height=64, width=64)
    latents = family_of(pipe).encode_pictures(pipe, pictures)
    encoded = pipe.vae.encode(pictures * 2 - 1)
    mode = encoded.latent if name == "sana" else encoded.latent_dist.mode()
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    torch.testing.assert_close(latents / pipe.vae.config.scaling_factor + shift, mode)


@pytest.mark.parametrize(
    ("name", "limit"), [("sd3", 256), ("pixart", 300), ("pixart alpha", 120), ("sana", 300)]
)
def test_prompts_have_the_tokenizers_length_or_the_stock_one(name: str, limit: int) -> None:
    pipe = BUILD[name]()
    family = family_of(pipe)
    assert family.text_length(pipe) == 12
    assert family.encode_prompts(pipe, ["a"])["prompt_embeds"].shape[1] == (24 if name == "sd3" else 12)
    tokenizer = pipe.tokenizer_3 if name == "sd3" else pipe.tokenizer
    tokenizer.model_max_length = 10**30  # transformers' way to say that there is no limit
    assert family.text_length(pipe) == limit


def test_every_self_attention_of_sd3_is_met() -> None:
    pipe = BUILD["sd3"]()
    first, last = pipe.transformer.transformer_blocks
    assert family_of(pipe).self_attentions(pipe.transformer) == [first.attn, first.attn2, last.attn]


@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_the_empty_prompt_is_encoded_once(name: str) -> None:
    """Also where training, which asks for it in every step, follows inference."""
    pipe = BUILD[name]()
    controller = Controller(pipe)
    controller.add_adapter("canny", LoCOConfig(r=2), tokens=TokensConfig())
    with torch.inference_mode(), controller(canny=condition_map()):
        pass
    pipe.text_encoder = None
    with controller(canny=condition_map(seed=1)):
        pass
    controller.clear_cache()
    with pytest.raises(UserError, match="needs the text encoder"), controller(canny=condition_map()):
        pass


def test_whether_pixart_is_guided_is_known_in_a_controlled_run_only() -> None:
    pipe = BUILD["pixart"]()
    family, seen = family_of(pipe), []
    pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(family.guidance_copies(pipe)))
    with family.watched(pipe):
        for scale in (3.0, 1.0):
            first_prediction(pipe, "cat", height=32, width=32, **call("pixart") | {"guidance_scale": scale})
    assert seen == [2, 2, 1, 1] and family.guidance_copies(pipe) == 1
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.parametrize("name", ["sd3", "pixart"])
@torch.no_grad()
def test_a_token_lies_in_the_middle_of_those_it_stands_for(name: str) -> None:
    layer = BUILD[name]().transformer.pos_embed
    picture = torch.zeros(1, layer.proj.in_channels, 16, 8)
    theirs = layer(picture).unflatten(1, (8, 4))
    small = torch.zeros(1, layer.proj.in_channels, 8, 4)
    plain = layer(small)
    with spread_patches(layer, small, 2):
        ours = layer(small).unflatten(1, (4, 2))
    torch.testing.assert_close(ours[0, 1, 1], theirs[0, 2:4, 2:4].mean((0, 1)))
    torch.testing.assert_close(ours[0, 3, 0], theirs[0, 6:8, 0:2].mean((0, 1)))
    with spread_patches(layer, small, 1):
        assert torch.equal(layer(small), plain)
    assert torch.equal(layer(small), plain) and torch.equal(layer(picture), theirs.flatten(1, 2))


def test_the_mean_of_positions_points_to_the_place_between_them() -> None:
    """Nearer than to any other place of a table four times as fine."""
    layer = BUILD["pixart"]().transformer.pos_embed
    small = torch.zeros(1, 4, 4, 4)
    with spread_patches(layer, small, 2):
        places = layer.pos_embed[0]
    side, fine = 4, 4
    table = get_2d_sincos_pos_embed(24, side * fine, base_size=layer.base_size, output_type="pt").float()
    nearest = torch.nn.functional.cosine_similarity(places[:, None], table[None], dim=-1).argmax(1)
    assert [divmod(int(n), side * fine) for n in nearest] == [(2, 2), (2, 10), (10, 2), (10, 10)]


@pytest.mark.parametrize("name", ["sd3", "pixart"])
@torch.no_grad()
def test_positions_change_in_a_compiled_model_too(name: str) -> None:
    pipe = BUILD[name]()
    family = family_of(pipe)
    text, time = family.encode_prompts(pipe, ["cat"]), torch.zeros(1)
    latents = torch.randn(1, pipe.transformer.config.in_channels, 8, 4)
    strides = (1, 2, 1, 2)

    def predictions() -> list[Tensor]:
        return [family.predict(pipe.transformer, latents, time, text, stride=stride) for stride in strides]

    expected = predictions()
    torch._dynamo.reset()
    pipe.transformer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(predictions(), expected)
    torch._dynamo.reset()
    assert not torch.equal(expected[0], expected[1])


def test_micro_conditions_are_the_pictures_size() -> None:
    pipe = build_alpha()
    family, seen = family_of(pipe), []
    pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    first_prediction(pipe, "cat", height=64, width=96, **call("pixart"))
    text = family.condition_text(pipe)
    for stride in (1, 2):
        latents = torch.zeros(1, 4, 8 // stride, 12 // stride)
        family.predict(pipe.transformer, latents, torch.zeros(1), text, stride=stride)
    expected, *ours = ((kwargs["added_cond_kwargs"]) for kwargs in (seen[0], *seen[-2:]))
    for key, tensor in expected.items():
        assert torch.equal(ours[0][key], tensor.view(1, -1)) and torch.equal(ours[1][key], tensor.view(1, -1))


def test_a_scheduler_that_draws_noise_still_gets_the_generator() -> None:
    """Pipelines look at the step's signature, which a window of the schedule must not hide."""
    pipe = BUILD["pixart"]()
    pipe.scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    controller = Controller(pipe)
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2), tokens=TokensConfig())
    randomise(controller, "canny")

    def draw() -> Tensor:
        return TINY["pixart"].draw(pipe, height=32, width=32)

    with controller(canny=condition_map(), start=0.5):
        assert torch.equal(draw(), draw())


@torch.no_grad()
@pytest.mark.parametrize("unconditional", [True, False])
def test_skip_layer_guidance_of_sd3(route: Route, unconditional: bool) -> None:
    """Its third prediction, of the conditional half alone, has the conditions of that half."""
    tiny, pipe = TINY["sd3"], fresh(TINY["sd3"])
    controller = Controller(pipe)
    add(controller, route)
    skipping = {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }
    arguments = {**tiny.guided, **skipping}
    noise = torch.randn(4, *tiny.draw(pipe).shape[1:], generator=torch.Generator().manual_seed(1))
    prompts, images = ["a cone", "a cube"], maps(tiny, batch=2)
    with controller(canny=images, unconditional=unconditional):
        together = tiny.draw(pipe, prompts, latents=noise, num_images_per_prompt=2, **arguments)
        without = tiny.draw(pipe, prompts, latents=noise, num_images_per_prompt=2, **tiny.guided)
    assert not torch.equal(together, without)
    for row in (1, 2):
        with controller(canny=images[row // 2, None], unconditional=unconditional):
            alone = tiny.draw(pipe, prompts[row // 2], latents=noise[row, None], **arguments)
        torch.testing.assert_close(together[row, None], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_sana_sprint(route: Route) -> None:
    """What `predict` asks of it is what its pipeline asks, whose steps are of another kind; and it is controlled."""
    tiny, pipe = TINY["sana"], build_sprint()
    pipe.set_progress_bar_config(disable=True)
    family, calls = family_of(pipe), []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )

    def draw() -> Tensor:
        size = {"height": 32, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        generator = torch.Generator().manual_seed(0)
        return pipe("a cube", generator=generator, guidance_scale=4.5, **size, **tiny.call).images

    stock = draw()
    hook.remove()
    (latents,), arguments, expected = calls[0]
    text = family.encode_prompts(pipe, ["a cube"])
    predicted = family.predict(pipe.transformer, latents, arguments["timestep"], text, guidance=4.5)
    torch.testing.assert_close(predicted, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(family.predict(pipe.transformer, latents, arguments["timestep"], text), predicted)
    assert family.guidance_arguments(pipe, 4.5, 1) == {"guidance_scale": 4.5}

    controller = Controller(pipe)
    add(controller, route)
    assert torch.equal(draw(), stock)
    drawn = []
    for seed in range(2):
        with controller(canny=maps(tiny, seed=seed, scale=(1, 2))):
            drawn.append(draw())
    assert all((a - b).abs().max() > 1e-4 for a, b in ((drawn[0], stock), (drawn[1], stock), tuple(drawn)))
    assert torch.equal(draw(), stock)
