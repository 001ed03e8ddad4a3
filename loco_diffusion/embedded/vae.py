"""Recipe of the packaged VAE: 8x, 16 channels, trained on scenes and on condition maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from loco_diffusion.conditions import get_condition
from loco_diffusion.data.scenes import TRAIN_SEEDS
from loco_diffusion.embedded.loop import train
from loco_diffusion.embedded.pictures import rendered_scenes
from loco_diffusion.images import to_pil, to_tensor

SCENES, BATCH, MAPS = 6000, 8, 2  # MAPS of the BATCH pictures are condition maps
KL_WEIGHT = 2e-3
DOWN = ("DownEncoderBlock2D",) * 4
UP = ("UpDecoderBlock2D",) * 4


def build_vae(steps: int, runs: Path, device: str) -> AutoencoderKL:
    """Train the VAE (or take it from its last checkpoint) and measure the scale of its latents."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=DOWN,
        up_block_types=UP,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        shift_factor=0.0,
    )
    _start_as_pyramid(vae)
    vae.to(device, memory_format=torch.channels_last)
    pictures, depths = rendered_scenes(TRAIN_SEEDS[:SCENES], runs)

    def loss_of_step(step: int) -> torch.Tensor:
        batch = _batch(pictures, depths, np.random.default_rng(step))
        return _loss(vae, batch.to(device, memory_format=torch.channels_last))

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    train(runs / "vae", vae, [optimizer], loss_of_step, steps)
    _normalise_latents(vae, pictures[:512])
    return vae


def _start_as_pyramid(vae: AutoencoderKL) -> None:
    """Start as a linear pyramid: average pooling down, nearest neighbours up, every residual branch silent.

    Colours are then right from the first steps; from the usual random start a network this small spends most of
    a short run finding them.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, torch.nn.Conv2d):
            continue
        if name.endswith("conv2"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif "sampler" in name:
            torch.nn.init.dirac_(module.weight)
            if module.stride == (2, 2):  # diffusers pads right and below, so the window starts at the centre tap
                module.weight.data = module.weight.data.roll((-1, -1), (2, 3))
                center = module.weight.data[:, :, 0, 0].clone()
                module.weight.data[:, :, :2, :2] = center[:, :, None, None] / 4
        elif "shortcut" in name:
            torch.nn.init.orthogonal_(module.weight)


def _loss(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels and of their differences (edges are what control is about), and a light KL."""
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    error = decoded - pictures
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + 2 * error.square().mean() + edges + KL_WEIGHT * kl


def _batch(pictures: torch.Tensor, depths: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """BATCH pictures (BATCH, 3, 128, 128) in [-1, 1], the first MAPS of them condition maps."""
    chosen = rng.integers(len(pictures), size=BATCH)
    maps = [_condition_map(pictures[index], depths[index], rng) for index in chosen[:MAPS]]
    return torch.cat([torch.stack(maps), pictures[torch.from_numpy(chosen[MAPS:])].float() / 255]) * 2 - 1


def _condition_map(picture: torch.Tensor, depth: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    name = ("canny", "depth", "mask", "colorization", "deblur")[rng.integers(5)]
    if name == "depth":  # the scene's own, since the depth network is trained later
        return depth.expand(3, -1, -1).float() / 255
    image = to_pil(picture.float() / 255)
    return to_tensor(get_condition(name).extract(image, rng))


@torch.no_grad()
def _normalise_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Write the mean and the spread of the latents into the configuration, as diffusers expects them."""
    scaled = (pictures.float() / 127.5 - 1).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in scaled.split(32)])
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
