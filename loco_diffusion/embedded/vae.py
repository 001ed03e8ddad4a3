"""Recipe of the packaged VAE: 8x, 16 channels, trained on crops of scenes and of condition maps."""

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

SCENES, BATCH, MAPS, CROP = 6000, 32, 8, 64  # MAPS of the BATCH crops are condition maps
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
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        shift_factor=0.0,
    )
    vae.to(device, memory_format=torch.channels_last)
    pictures, depths = rendered_scenes(TRAIN_SEEDS[:SCENES], runs)

    def loss_of_step(step: int) -> torch.Tensor:
        crops = _crops(pictures, depths, np.random.default_rng(step))
        return _loss(vae, crops.to(device, memory_format=torch.channels_last))

    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    train(runs / "vae", vae, [optimizer], loss_of_step, steps)
    _normalise_latents(vae, pictures[:512])
    return vae


def _loss(vae: AutoencoderKL, crops: torch.Tensor) -> torch.Tensor:
    """Absolute error of pixels and of their differences (edges are what control is about), and a light KL."""
    posterior = vae.encode(crops).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    error = decoded - crops
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + edges + KL_WEIGHT * kl


def _crops(pictures: torch.Tensor, depths: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """BATCH crops (BATCH, 3, CROP, CROP) in [-1, 1]; four from each picture or map drawn."""
    per_picture = 4
    drawn = []
    for number, index in enumerate(rng.integers(len(pictures), size=BATCH // per_picture)):
        if number < MAPS // per_picture:
            whole = _condition_map(pictures[index], depths[index], rng)
        else:
            whole = pictures[index].float() / 255
        for top, left in rng.integers(whole.shape[-1] - CROP + 1, size=(per_picture, 2)):
            drawn.append(whole[:, top : top + CROP, left : left + CROP])
    return torch.stack(drawn) * 2 - 1


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
