"""Recipe of the packaged VAE: 8x, 32 channels, trained on scenes and on condition maps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from loco_diffusion.conditions import get_condition
from loco_diffusion.data.scenes import TRAIN_SEEDS
from loco_diffusion.embedded.loop import half_precision, train
from loco_diffusion.embedded.pictures import rendered_scenes
from loco_diffusion.images import to_pil, to_tensor

SCENES, BATCH, MAPS = 12_000, 8, 2  # MAPS of the BATCH pictures are condition maps
LATENT_CHANNELS, NORM_GROUPS = 32, 4
KL_WEIGHT = 2e-4
DECODER_SEED = 1_000_000  # other batches than those of the whole VAE
DOWN = ("DownEncoderBlock2D",) * 4
UP = ("UpDecoderBlock2D",) * 4


def build_vae(steps: int, runs: Path, device: str) -> AutoencoderKL:
    """Train the VAE (or take it from its last checkpoint) and measure the scale of its latents."""
    torch.manual_seed(0)
    vae = untrained_vae()
    pictures, depths = rendered_scenes(TRAIN_SEEDS[:SCENES], runs)
    _start_as_patches(vae, pictures[:32].float() / 127.5 - 1)
    vae.to(device, memory_format=torch.channels_last)

    def loss_of_step(step: int) -> torch.Tensor:
        batch = _batch(pictures, depths, np.random.default_rng(step))
        with half_precision(device):
            return _loss(vae, batch.to(device, memory_format=torch.channels_last))

    optimizer = torch.optim.AdamW(vae.parameters(), lr=8e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    train(runs / "vae", vae, [optimizer], loss_of_step, steps)
    _normalise_latents(vae, pictures[:512])
    return vae


def refine_decoder(steps: int, vae: AutoencoderKL, runs: Path, device: str) -> AutoencoderKL:
    """Train the decoder further, on latents that stay as they are: base models may train beside it."""
    pictures, depths = rendered_scenes(TRAIN_SEEDS[:SCENES], runs)
    vae.to(device, memory_format=torch.channels_last).encoder.requires_grad_(False)

    def loss_of_step(step: int) -> torch.Tensor:
        batch = _batch(pictures, depths, np.random.default_rng(DECODER_SEED + step))
        with half_precision(device):
            return _loss(vae, batch.to(device, memory_format=torch.channels_last), kl_weight=0.0)

    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=6e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    train(runs / "decoder", vae.decoder, [optimizer], loss_of_step, steps)
    return vae


def untrained_vae() -> AutoencoderKL:
    """A fresh VAE of about 2.6 million parameters."""
    return AutoencoderKL(
        down_block_types=DOWN,
        up_block_types=UP,
        block_out_channels=(16, 32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=NORM_GROUPS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=128,
        shift_factor=0.0,
    )


@torch.no_grad()
def _start_as_patches(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Start near the principal components of 8x8 patches, every residual branch silent.

    From the usual random start a network this small spends most of a short run finding the colours. Every
    downsampling keeps the strongest components of 2x2 blocks of what it is given. In front of the encoder's last
    activation stand the components x and -x, because silu(x) - silu(-x) = x; what its normalisation changes is
    undone by least squares. The decoder starts as a blurred picture of the latents, also by least squares.
    """
    for name, module in vae.named_modules():
        if isinstance(module, torch.nn.Conv2d) and name.endswith("conv2"):
            torch.nn.init.zeros_(module.weight)
            assert module.bias is not None
            torch.nn.init.zeros_(module.bias)
    _fit_encoder(vae, pictures)
    latents = vae.encode(pictures).latent_dist.mean
    for name, module in vae.decoder.named_modules():
        if "sampler" in name and isinstance(module, torch.nn.Conv2d):
            torch.nn.init.dirac_(module.weight)
        elif name.endswith("shortcut"):
            torch.nn.init.orthogonal_(module.weight)
    first, last = vae.decoder.conv_in, vae.decoder.conv_out
    torch.nn.init.zeros_(first.weight)
    torch.nn.init.orthogonal_(first.weight[:, :, 1, 1], gain=2)
    torch.nn.init.zeros_(last.weight)
    decode = partial(vae.decode, latents)
    last.weight[:, :, 1, 1], last.bias[:] = _least_squares(_input_of(last, decode), pictures)


def _fit_encoder(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """The encoder's half of `_start_as_patches`."""
    encoder, count = vae.encoder, LATENT_CHANNELS
    torch.nn.init.dirac_(encoder.conv_in.weight)
    torch.nn.init.zeros_(encoder.conv_in.bias)
    features = pictures
    for block in encoder.down_blocks:
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None:
            torch.nn.init.dirac_(shortcut.weight)
            torch.nn.init.zeros_(shortcut.bias)
        for downsampler in block.downsamplers or ():
            components = _block_components(features, downsampler.conv.out_channels)
            kept, channels = components.shape[:2]
            torch.nn.init.zeros_(downsampler.conv.weight)
            torch.nn.init.zeros_(downsampler.conv.bias)
            # diffusers pads right and below: the window's first two taps a side are the block
            downsampler.conv.weight[:kept, :channels, :2, :2] = components
            features = torch.nn.functional.conv2d(features, components, stride=2)
    spread, mean = features.std(dim=(0, 2, 3)), features.mean(dim=(0, 2, 3))
    shortcut.weight[:] = torch.cat([torch.diag(1 / spread), torch.diag(-1 / spread)])[:, :, None, None]
    shortcut.bias[:] = torch.cat([-mean / spread, mean / spread])
    whitened = (features - mean[:, None, None]) / spread[:, None, None]
    # Strong components stay somewhat larger: their noise weighs most in the picture.
    target = whitened[:, :count] * (spread[:count, None, None] / spread[count - 1]).sqrt()
    last = encoder.conv_out
    weight, bias = _least_squares(_input_of(last, partial(vae.encode, pictures)), target)
    last.weight[:count] = 0
    last.weight[:count, :, 1, 1], last.bias[:count] = weight, bias
    last.weight[count:] *= 0.1  # log variances: start nearly without noise
    last.bias[count:] = -3


def _block_components(features: torch.Tensor, most: int) -> torch.Tensor:
    """The `most` strongest components of 2x2 blocks of `features` (N, C, H, W), as weights (K, C, 2, 2)."""
    channels = features.shape[1]
    blocks = features.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(-1, 4 * channels)
    vectors = torch.linalg.eigh(blocks.T @ blocks / len(blocks)).eigenvectors  # weakest first
    return vectors.flip(1)[:, :most].T.reshape(-1, channels, 2, 2)


def _input_of(layer: torch.nn.Module, run: Callable[[], object]) -> torch.Tensor:
    """What `layer` is given while `run` runs."""
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run()
    hook.remove()
    return seen[0]


def _least_squares(features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (C_out, C_in) and bias of the 1x1 convolution that best maps `features` to `target`."""
    rows = features.movedim(1, -1).flatten(0, 2)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    gram = rows.T @ rows / len(rows) + 1e-5 * torch.eye(rows.shape[1])
    solution = torch.linalg.solve(gram, rows.T @ target.movedim(1, -1).flatten(0, 2) / len(rows))
    return solution[:-1].T, solution[-1]


def _loss(vae: AutoencoderKL, pictures: torch.Tensor, kl_weight: float = KL_WEIGHT) -> torch.Tensor:
    """Error of pixels and of their differences (edges are what control is about), and a light KL."""
    posterior = vae.encode(pictures).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    error = decoded - pictures
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.abs().mean() + 10 * error.square().mean() + edges + kl_weight * kl


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
