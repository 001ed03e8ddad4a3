"""Recipe of the second packaged base: a Stable Diffusion of the scenes' world, on the first base's VAE.

A UNet of two levels, 16 x 16 and 8 x 8, since every token of 8 pixels already has 32 channels: a third level of 4 x 4
would add a third to the parameters and nothing that attention at 8 x 8 does not see. One residual block a level
instead of two, so that both levels can have attention: the 16 x 16 convolutions cost most, and the adapters that
control this base live in its attentions, which must reach single tokens. A training step takes 1.7 times as long as the
first base's: 1.75 against 1.05 s for 48 pictures, both compiled, on two cores of an EPYC.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from loco_diffusion.control.unet import TRAINING_TIMESTEPS, UNetFamily
from loco_diffusion.data.scenes import TRAIN_SEEDS, sample_scene
from loco_diffusion.embedded import lessons
from loco_diffusion.embedded.loop import half_precision, train
from loco_diffusion.embedded.text import TEXT_LENGTH, build_tokenizers, clip_config_of
from loco_diffusion.training.compilation import compile_blocks

CHANNELS, HEADS = (128, 192), (4, 6)
TEXT_WIDTH = 128


def build_unet_base(
    steps: int, vae: AutoencoderKL, runs: Path, device: str, compiled: bool = False
) -> StableDiffusionPipeline:
    """Train the UNet with its text encoder (or take them from their last checkpoint).

    Compiled, the UNet's part of a step took 1.5 instead of 1.7 s on the two cores of an EPYC with AVX-512 BF16.
    """
    pipe = untrained_pipeline(vae.to(device))
    if compiled:
        compile_blocks(pipe.unet)
    model = nn.ModuleDict(
        {
            "unet": pipe.unet.to(device, memory_format=torch.channels_last),
            "text_encoder": pipe.text_encoder.to(device),
            "layout": lessons.layout_head(CHANNELS[-1]).to(device),
        }
    ).train()
    latents = lessons.scene_latents(pipe, runs)
    shift = drop_shift(vae)
    scenes = [sample_scene(seed) for seed in TRAIN_SEEDS[: lessons.SCENES]]
    layouts = lessons.scene_layouts(scenes, pipe.unet.config.sample_size // 2)
    ids = lessons.token_ids(pipe.tokenizer, [scene.caption for scene in scenes] + [""])
    inner = lessons.KeptOutput(pipe.unet.mid_block)

    def loss_of_step(step: int) -> torch.Tensor:
        chosen, told = lessons.batch_of_step(step)
        layout = layouts[chosen].to(device)
        with half_precision(device):
            text = model["text_encoder"](ids[told].to(device)).last_hidden_state
            clean = latents[chosen].to(device).float() + shift
            loss = _loss(model["unet"], pipe.scheduler, clean, text, layout)
            told_layout = model["layout"](inner.output.flatten(2).mT)
        return loss + lessons.LAYOUT_WEIGHT * lessons.layout_loss(told_layout, layout)

    train(runs / "unet", model, lessons.optimizers(model, lr=1e-3), loss_of_step, steps)
    model.eval()
    return pipe


def untrained_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """The pipeline around `vae` with a fresh text encoder and a fresh UNet of about 11 M parameters."""
    tokenizer, _ = build_tokenizers()
    tokenizer.model_max_length = TEXT_LENGTH
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        attention_head_dim=HEADS,  # their number, which has this name in a UNet
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
    )
    _start_silent(unet)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(clip_config_of(tokenizer, TEXT_WIDTH, layers=2, heads=4)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _scheduler() -> DDIMScheduler:
    """Stable Diffusion's, down to no signal at all (arXiv 2305.08891), where only velocities can be predicted.

    A quarter of its timesteps has a signal-to-noise ratio below 0.03, where 32 channels still show where solids are to
    stand; of the cosine schedule's (arXiv 2102.09672) a tenth.
    """
    return DDIMScheduler(
        num_train_timesteps=TRAINING_TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # not used with this spacing, but the pipeline warns of any other
        clip_sample=False,
    )


def _start_silent(unet: UNet2DConditionModel) -> None:
    """Zero the last layer of every residual branch and of the whole."""
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def drop_shift(vae: AutoencoderKL) -> float:
    """Take the shift of the latents out of the configuration, which Stable Diffusion's pipeline does not know of.

    Returns:
        What latents normalised with the shift lack to those normalised without.
    """
    shift: float = (vae.config.shift_factor or 0.0) * vae.config.scaling_factor
    vae.register_to_config(shift_factor=0.0)
    return shift


def _loss(
    unet: nn.Module, scheduler: DDIMScheduler, clean: torch.Tensor, text: torch.Tensor, layouts: torch.Tensor
) -> torch.Tensor:
    """Squared error of the velocity (arXiv 2202.00512) at uniform timesteps."""
    noise = torch.randn_like(clean)
    timesteps = torch.randint(TRAINING_TIMESTEPS, (len(clean),), device=clean.device)
    mixed = scheduler.add_noise(clean, noise, timesteps)
    sigma = timesteps / TRAINING_TIMESTEPS
    velocity = UNetFamily().predict(unet, mixed, sigma, {"prompt_embeds": text})
    signal = scheduler.alphas_cumprod.to(clean.device)[timesteps].sqrt()
    return lessons.velocity_loss(velocity - scheduler.get_velocity(clean, noise, timesteps), signal, layouts)
