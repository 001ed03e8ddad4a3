"""What UNets have that other families have not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from control_helpers import condition_map
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from peft import LoraConfig
from tiny_pipelines import TINY, sd, sdxl
from tiny_pipelines.controlled import randomise

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import EncoderConfig, TokensConfig, family_of
from loco_diffusion.control.sampling import Sampling
from loco_diffusion.control.unet import UNetFamily
from loco_diffusion.errors import UserError

SIZE = {"height": 64, "width": 96}
BUILD: dict[str, Callable[[], Any]] = {
    "sd1": sd.build,
    "sd2": lambda: sd.build(version=2),
    "sdxl": sdxl.build,
}


@pytest.fixture(params=BUILD)
def pipe(request: pytest.FixtureRequest) -> Any:
    pipe = BUILD[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: str | list[str] = "a red cube", **arguments: Any) -> torch.Tensor:
    arguments = {"guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent", **SIZE} | arguments
    arguments.setdefault("generator", torch.Generator().manual_seed(0))
    return pipe(prompt, **arguments).images


def add_tokens(pipe: Any) -> Controller:
    controller = Controller(pipe)
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2), tokens=TokensConfig())
    randomise(controller, "canny")
    return controller


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_predict_is_the_pipelines(pipe: Any, dtype: torch.dtype) -> None:
    """Noise or v, as the scheduler understands it, of a picture that is not square."""
    pipe.to(dtype=dtype)
    family, scheduler = family_of(pipe), pipe.scheduler
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = draw(pipe, latents=noise, num_inference_steps=1)
    scheduler.set_timesteps(1)
    time = scheduler.timesteps[0]
    noisy = noise * scheduler.init_noise_sigma
    prediction = family.predict(
        pipe.unet,
        scheduler.scale_model_input(noisy, time),
        time[None] / scheduler.config.num_train_timesteps,
        family.encode_prompts(pipe, ["a red cube"]),
    )
    scheduler.set_timesteps(1)
    stepped = scheduler.step(prediction, time, noisy).prev_sample
    torch.testing.assert_close(stepped, drawn, atol=1e-5, rtol=1e-5)


def test_facts() -> None:
    one, two, xl = (build() for build in BUILD.values())
    assert [type(family_of(pipe)) for pipe in (one, two, xl)] == [UNetFamily] * 3
    family = UNetFamily()
    numbers = [family.base_numbers(pipe) for pipe in (one, two, xl)]
    assert numbers[0] == {
        "token_pixels": 8,
        "in_channels": 4,
        "cross_attention_dim": 32,
        "hidden_size": 16,
        "self_attentions": 4,
    }
    assert numbers[1] == numbers[0]
    assert numbers[2] == numbers[0] | {"cross_attention_dim": 64, "self_attentions": 8}
    assert all(attention.is_cross_attention is False for attention in family.self_attentions(xl.unet))
    assert family.text_length(xl) == 12 and family.prompt_length(xl, "a red cube") == 10
    assert family.default_sampling(one) == Sampling(64, 64, steps=50, guidance=7.5)
    assert family.default_sampling(xl) == Sampling(64, 64, steps=50, guidance=5.0)
    one.unet.register_to_config(sample_size=(4, 6))
    assert family.default_sampling(one) == Sampling(width=48, height=32, steps=50, guidance=7.5)


def test_the_empty_prompt_is_encoded_once(pipe: Any) -> None:
    calls = []
    pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    controller = add_tokens(pipe)
    with torch.inference_mode(), controller(canny=condition_map()):
        pass
    for seed in range(2):
        with controller(canny=condition_map(seed)):
            pass
    assert len(calls) == 1
    controller.clear_cache()
    pipe.text_encoder = None
    with pytest.raises(UserError, match="needs the text encoder"), controller(canny=condition_map()):
        pass


def test_a_vae_does_not_overflow_in_half_precision(pipe: Any) -> None:
    family = family_of(pipe)
    pictures = condition_map(batch=2)
    pipe.vae.half().float()  # weights that half precision can hold
    latents = family.encode_pictures(pipe, pictures)
    decoded = family.decode_latents(pipe, latents)
    weights = {name: tensor.clone() for name, tensor in pipe.vae.half().state_dict().items()}
    assert torch.equal(family.encode_pictures(pipe, pictures), latents)
    assert torch.equal(family.decode_latents(pipe, latents), decoded) and decoded.dtype == torch.float32
    assert decoded.shape == pictures.shape
    for name, tensor in pipe.vae.state_dict().items():
        assert tensor.dtype == torch.float16 and torch.equal(tensor, weights[name])


@pytest.mark.parametrize("encoder_input", ["pixels", "latents"])
def test_an_inpainting_model(encoder_input: Any) -> None:
    """It reads a mask and the masked picture as well."""
    parts = sd.build().components
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9).eval()
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    controller = Controller(pipe)
    encoder = EncoderConfig(encoder_input, hidden_size=8)
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2), encoder=encoder)
    randomise(controller, "canny")
    arguments = {"image": condition_map(height=64, width=96), "mask_image": torch.ones(1, 1, 64, 96)}
    stock = draw(pipe, **arguments)
    with controller(canny=condition_map(height=64, width=96)):
        assert not torch.equal(draw(pipe, **arguments), stock)
    controller.delete_adapter("canny")
    with pytest.raises(UserError, match="9 channels and not 4"), add_tokens(pipe)(canny=condition_map()):
        pass


@torch.no_grad()
def test_the_input_layer_may_be_adapted(pipe: Any) -> None:
    """The features are added once, to what the adapted layer gives."""
    stock = draw(pipe)
    controller = Controller(pipe)
    config = LoraConfig(r=2, target_modules=["conv_in"])
    controller.add_adapter("canny", config, encoder=EncoderConfig(hidden_size=8))
    randomise(controller, "canny")
    assert torch.equal(draw(pipe), stock)
    latents, image = torch.randn(1, 4, 8, 12), condition_map(height=64, width=96)
    free = pipe.unet.conv_in(latents)
    with controller(canny=image):
        both = pipe.unet.conv_in(latents)
        lora = pipe.unet.conv_in.lora_B["canny"](pipe.unet.conv_in.lora_A["canny"](latents))
        features = controller._hooks.conditioning.features._sum
        torch.testing.assert_close(both, free + 8 / 2 * lora + features)
        assert not torch.equal(draw(pipe), stock)


@torch.no_grad()
def test_compiled_with_guidance_and_a_condition_for_each_picture() -> None:
    pipe = TINY["sd"].build()
    pipe.set_progress_bar_config(disable=True)
    controller = Controller(pipe)
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2))
    randomise(controller, "canny")
    guided = {"prompt": ["a", "b"], "guidance_scale": 3.0}
    maps = condition_map(batch=2, height=64, width=96)
    with controller(canny=maps):
        expected = draw(pipe, **guided)
        torch._dynamo.reset()
        pipe.unet.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(draw(pipe, **guided), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
