"""The recipe of the base with a UNet: a silent start, latents without a shift, and a run of two steps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from loco_diffusion.bases import load_base
from loco_diffusion.control import Controller, family_of
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import sample_scene
from loco_diffusion.embedded import lessons, unet_base
from loco_diffusion.generation import Sampling, Session
from loco_diffusion.images import to_pil

SCENES = 4


def tiny_vae() -> AutoencoderKL:
    """A VAE of four small levels whose latents have a shift."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        latent_channels=8,
        norm_num_groups=4,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        shift_factor=0.5,
        scaling_factor=0.75,
    ).eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def built(runs: Path) -> StableDiffusionPipeline:
    """What the recipe makes of four scenes in two steps of two."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loco_diffusion.embedded.pictures._SHARD", SCENES)
        patch.setattr(lessons, "SCENES", SCENES)
        patch.setattr(lessons, "BATCH", 2)
        patch.setattr("loco_diffusion.embedded.loop.UNFINISHED", runs)
        first = unet_base.build_unet_base(2, tiny_vae(), runs, "cpu")
        again = unet_base.build_unet_base(2, tiny_vae(), runs, "cpu")  # from its checkpoint
    for one, other in zip(first.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(one, other)
    return again


@pytest.fixture(scope="module")
def untrained() -> StableDiffusionPipeline:
    return unet_base.untrained_pipeline(tiny_vae())


def test_the_untrained_unet_predicts_zero_velocity(untrained: StableDiffusionPipeline) -> None:
    pipe = untrained
    assert 10e6 < sum(parameter.numel() for parameter in pipe.unet.parameters()) < 12e6
    clean, text = torch.zeros(2, 8, 4, 4), torch.randn(2, 5, unet_base.TEXT_WIDTH)
    torch.manual_seed(3)
    nothing = torch.zeros(2, 4, 15)  # no solids in sight
    loss = unet_base._loss(pipe.unet, pipe.scheduler, clean, text, nothing)
    torch.manual_seed(3)
    noise = torch.randn_like(clean)
    timesteps = torch.randint(1000, (2,))
    signal = pipe.scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    torch.testing.assert_close(loss, (signal * noise).square().mean())
    assert pipe.scheduler.alphas_cumprod[-1] == 0


def test_latents_without_a_shift_mean_the_same_pictures(untrained: StableDiffusionPipeline) -> None:
    pictures = render([sample_scene(3)]).image
    pipe = copy.deepcopy(untrained)
    family = family_of(pipe)
    with_shift = family.encode_pictures(pipe, pictures)
    decoded = family.decode_latents(pipe, with_shift)
    shift = unet_base.drop_shift(pipe.vae)
    without = family.encode_pictures(pipe, pictures)
    torch.testing.assert_close(with_shift + shift, without)
    torch.testing.assert_close(family.decode_latents(pipe, without), decoded)
    stock = (
        pipe.vae.decode(without / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    )  # as the pipeline decodes
    torch.testing.assert_close(stock.detach(), decoded)


def test_two_steps_change_every_part(
    built: StableDiffusionPipeline, untrained: StableDiffusionPipeline
) -> None:
    assert built.unet.conv_out.weight.abs().max() > 0
    for name in ("unet", "text_encoder"):
        parts = zip(getattr(built, name).parameters(), getattr(untrained, name).parameters(), strict=True)
        assert any(not torch.equal(one, other) for one, other in parts), name


def test_a_built_base_is_loaded_draws_and_can_be_controlled(
    built: StableDiffusionPipeline, tmp_path: Path
) -> None:
    built.save_pretrained(tmp_path / "unet_base")
    session = Session(load_base(tmp_path / "unet_base", torch.float32), Sampling(128, 128, 2, 2.0))
    assert session.pipe.scheduler.config.rescale_betas_zero_snr
    first, second = session.generate(["a small matte red box", ""], [0, 1])
    assert first.size == (128, 128) and first.tobytes() != second.tobytes()
    longest = (
        "a small matte red box, a small glossy black cylinder, a medium matte white cone and a medium glossy"
    )
    session.check_prompt_length(longest + " pink sphere on a checkered olive ground under a sunset sky")
    original = to_pil(render([sample_scene(1)]).image[0])
    assert session.reconstruct([original])[0].size == (128, 128)
    assert Controller(session.pipe).family.token_pixels(session.pipe) == 8
