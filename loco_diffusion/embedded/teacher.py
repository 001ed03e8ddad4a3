"""The UNet base as a teacher of the DiT base: what it makes of a noisy picture, in the DiT's terms."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

from loco_diffusion.control.unet import TRAINING_TIMESTEPS, UNetFamily


class Teacher:
    """Tells the velocity that is to be expected of a noisy picture and its caption.

    Args:
        pipe: a base from `unet_base`, frozen here.
        shift: what its latents have more than the DiT's, see `unet_base.shift_of`.
    """

    def __init__(self, pipe: StableDiffusionPipeline, shift: float) -> None:
        self.unet = pipe.unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.text_encoder = pipe.text_encoder.eval().requires_grad_(False)
        self.shift = shift
        signal = pipe.scheduler.alphas_cumprod.sqrt()
        noise = (1 - signal.square()).sqrt()
        self.noise_shares = noise / (signal + noise)  # (TRAINING_TIMESTEPS,), rising to 1

    @torch.no_grad()
    def velocity(self, mixed: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The flow's velocity, noise less clean latents, in the mean over all pictures that `mixed` may come from.

        Args:
            mixed: (B, C, h, w), (1 - sigma) of the clean latents and sigma of the noise.
            sigma: (B,) in [0, 1].
            ids: (B, tokens) of the captions.
        """
        share = sigma[:, None, None, None]
        length = torch.hypot(1 - share, share)  # a UNet's signal and noise have squares that sum to 1
        signal, noise = (1 - share) / length, share / length
        seen = mixed / length + signal * self.shift
        timesteps = torch.searchsorted(self.noise_shares.to(sigma.device), sigma)
        timesteps = timesteps.clamp(max=TRAINING_TIMESTEPS - 1) / TRAINING_TIMESTEPS
        text = {"prompt_embeds": self.text_encoder(ids).last_hidden_state}
        told = UNetFamily().predict(self.unet, seen, timesteps, text).float()
        return (noise - signal) * seen + (signal + noise) * told + self.shift
