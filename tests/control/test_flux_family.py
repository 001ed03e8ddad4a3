"""What the toolkit does with a FLUX model by itself agrees with the stock pipeline."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from control_helpers import condition_map, draw
from diffusers import FluxPipeline

from loco_diffusion.control import ConditionEncoder, EncoderConfig, family_of
from loco_diffusion.control.flux import FluxFamily
from loco_diffusion.control.map_tokens import pixel_tokens

FAMILY = FluxFamily()


def test_packing_is_the_pipelines_own() -> None:
    latents = torch.randn(2, 16, 4, 6)
    packed = FAMILY.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 4, 6))
    assert torch.equal(FAMILY.unpack(packed, 2, 3), latents)


def test_pixel_tokens_lie_where_the_packed_latents_lie() -> None:
    maps = torch.zeros(1, 3, 32, 48)
    maps[:, :, 16:, 32:] = 1
    latents = maps[:, :1, ::8, ::8]
    assert FAMILY.pack(latents)[0].amax(1).tolist() == [0, 0, 0, 0, 0, 1]
    tokens = pixel_tokens(maps, 16)
    assert tokens.shape == (1, 6, 768)
    assert tokens[0].amax(1).tolist() == [-1, -1, -1, -1, -1, 1]


@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_is_what_the_pipeline_computes(
    make_flux: Callable[..., FluxPipeline], guidance_embeds: bool, dtype: torch.dtype
) -> None:
    pipe = make_flux(guidance_embeds=guidance_embeds).to(dtype=dtype)
    noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = FAMILY.pack(noise)
    size = {"height": 32, "width": 48}
    final = draw(pipe, latents=packed, num_inference_steps=1, guidance_scale=2.0, **size)
    text = FAMILY.encode_prompts(pipe, ["a red cube"])
    with torch.no_grad():
        velocity = FAMILY.predict(pipe.transformer, noise, torch.ones(1), text, guidance=2.0)
        other = FAMILY.predict(pipe.transformer, noise, torch.ones(1), text)
    assert velocity.shape == noise.shape and velocity.dtype == dtype
    # One step from sigma 1 to 0 subtracts the velocity.
    torch.testing.assert_close((noise.float() - velocity.float()).to(dtype), FAMILY.unpack(final, 2, 3))
    assert torch.equal(velocity, other) != guidance_embeds


def test_pictures_are_encoded_as_the_pipeline_decodes(flux: FluxPipeline) -> None:
    pictures = condition_map(batch=2)
    latents = FAMILY.encode_pictures(flux, pictures)
    assert latents.shape == (2, 16, 4, 4) and latents.dtype == torch.float32 and not latents.requires_grad
    mode = flux.vae.encode(pictures * 2 - 1).latent_dist.mode()
    undone = latents / flux.vae.config.scaling_factor + flux.vae.config.shift_factor
    torch.testing.assert_close(undone, mode)


def test_prompts_have_the_tokenizers_length(flux: FluxPipeline) -> None:
    text = FAMILY.encode_prompts(flux, ["a", "a very long prompt " * 20])
    assert text["prompt_embeds"].shape == (2, 12, 32)
    assert text["pooled_prompt_embeds"].shape == (2, 32) and text["text_ids"].shape == (12, 3)
    flux.tokenizer_2.model_max_length = 10**30  # transformers' way to say that there is no limit
    assert FAMILY.text_length(flux) == 512


def test_facts(flux: FluxPipeline) -> None:
    family = family_of(flux)
    assert family.token_pixels(flux) == 16
    assert family.hidden_size(flux.transformer) == 32
    assert family.token_channels(flux.transformer) == 64
    ids = FluxPipeline._prepare_latent_image_ids(1, 2, 3, "cpu", torch.float32)
    assert family.grid({"img_ids": ids}) == (2, 3) and family.grid({}) is None


def test_encoder_starts_at_zero_in_float32() -> None:
    encoder = ConditionEncoder(12, 8, EncoderConfig(hidden_size=4))
    assert encoder(torch.randn(2, 5, 12)).shape == (2, 5, 8)
    assert not encoder(torch.randn(2, 5, 12)).any()
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
