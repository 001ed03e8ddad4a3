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
LATENT_CHANNELS, NORM_GROUPS = 16, 4
KL_WEIGHT = 2e-3
DOWN = ("DownEncoderBlock2D",) * 4
UP = ("UpDecoderBlock2D",) * 4


def build_vae(steps: int, runs: Path, device: str) -> AutoencoderKL:
    """Train the VAE (or take it from its last checkpoint) and measure the scale of its latents."""
    torch.manual_seed(0)
    vae = untrained_vae()
    pictures, depths = rendered_scenes(TRAIN_SEEDS[:SCENES], runs)
    _start_as_pyramid(vae)
    _fit_ends(vae, pictures[:32].float() / 127.5 - 1)
    vae.to(device, memory_format=torch.channels_last)

    def loss_of_step(step: int) -> torch.Tensor:
        batch = _batch(pictures, depths, np.random.default_rng(step))
        return _loss(vae, batch.to(device, memory_format=torch.channels_last))

    optimizer = torch.optim.AdamW(vae.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    train(runs / "vae", vae, [optimizer], loss_of_step, steps)
    _normalise_latents(vae, pictures[:512])
    return vae


def untrained_vae() -> AutoencoderKL:
    """A fresh VAE of about a million parameters."""
    return AutoencoderKL(
        down_block_types=DOWN,
        up_block_types=UP,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=NORM_GROUPS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        shift_factor=0.0,
    )


def _start_as_pyramid(vae: AutoencoderKL) -> None:
    """Start as a linear pyramid: average pooling down, nearest neighbours up, every residual branch silent.

    Together with `_fit_ends` this makes the untrained VAE a blurred but coloured round trip; from the usual
    random start a network this small spends most of a short run finding the colours.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, torch.nn.Conv2d):
            continue
        if name.endswith("conv2"):
            for parameter in module.parameters():
                torch.nn.init.zeros_(parameter)
        elif "sampler" in name:
            torch.nn.init.dirac_(module.weight)
            if module.stride == (2, 2):  # diffusers pads right and below: the window starts at the tap 0, 0
                module.weight.data = module.weight.data.roll((-1, -1), (2, 3))
                center = module.weight.data[:, :, 0, 0].clone()
                module.weight.data[:, :, :2, :2] = center[:, :, None, None] / 4
        elif "shortcut" in name:
            torch.nn.init.orthogonal_(module.weight)


@torch.no_grad()
def _fit_ends(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Set the outer layers by least squares: the first latents to the mean colours, the output to the picture."""
    encoder, decoder = vae.encoder, vae.decoder
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0]))
        for name, layer in (("encoded", encoder.conv_out), ("decoded", decoder.conv_out))
    ]
    vae.encode(pictures)
    contrast = 2.0
    weight, bias = _least_squares(seen["encoded"], contrast * torch.nn.functional.avg_pool2d(pictures, 8))
    encoder.conv_out.weight[:3] = 0
    encoder.conv_out.weight[:3, :, 1, 1] = weight
    encoder.conv_out.bias[:3] = bias
    encoder.conv_out.weight[LATENT_CHANNELS:] *= 0.1  # log variances: start nearly without noise
    encoder.conv_out.bias[LATENT_CHANNELS:] = -4
    torch.nn.init.zeros_(decoder.conv_in.weight)
    torch.nn.init.orthogonal_(decoder.conv_in.weight[:, :, 1, 1], gain=2)
    vae.decode(vae.encode(pictures).latent_dist.mean)
    weight, bias = _least_squares(seen["decoded"], pictures)
    torch.nn.init.zeros_(decoder.conv_out.weight)
    decoder.conv_out.weight[:, :, 1, 1] = weight
    decoder.conv_out.bias[:] = bias
    for hook in hooks:
        hook.remove()


def _least_squares(features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (C_out, C_in) and bias of the 1x1 convolution that best maps `features` to `target`."""
    rows = features.movedim(1, -1).flatten(0, 2)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    gram = rows.T @ rows / len(rows) + 1e-5 * torch.eye(rows.shape[1])
    solution = torch.linalg.solve(gram, rows.T @ target.movedim(1, -1).flatten(0, 2) / len(rows))
    return solution[:-1].T, solution[-1]


def _loss(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Error of pixels and of their differences (edges are what control is about), and a light KL."""
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    error = decoded - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + 10 * error.square().mean() + edges + KL_WEIGHT * kl


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
    """Even out the latents' channels and write their mean and spread into the configuration.

    The first channels hold the colours and are some ten times as wide as those of the details, which a
    diffusion model would then hardly learn. Scaling a channel in the encoder and back in the decoder changes
    no picture; half of the difference (on a logarithmic scale) is taken out, so that colours still come first.
    """
    scaled = (pictures.float() / 127.5 - 1).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in scaled.split(32)])
    gain = latents.std(dim=(0, 2, 3)).rsqrt()
    encoded, decoded = vae.encoder.conv_out, vae.decoder.conv_in
    encoded.weight[:LATENT_CHANNELS] *= gain[:, None, None, None]
    encoded.bias[:LATENT_CHANNELS] *= gain
    encoded.bias[LATENT_CHANNELS:] += 2 * gain.log()  # the log variances
    decoded.weight /= gain[:, None, None]
    latents *= gain[:, None, None]
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
