"""What the control tests share."""

from __future__ import annotations

import torch
from diffusers import FluxPipeline
from tiny_pipelines.controlled import random_maps
from tiny_pipelines.controlled import randomise as randomise
from torch import Tensor

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import EncoderConfig

SIZE = 32


def draw(pipe: FluxPipeline, prompt: str | list[str] = "a red cube", **arguments: object) -> Tensor:
    """Two denoising steps at 32 px, as latents (B, 4, 64), always from the same noise."""
    arguments = {
        "height": SIZE,
        "width": SIZE,
        "num_inference_steps": 2,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "max_sequence_length": 12,
    } | arguments
    return pipe(prompt, **arguments).images


def condition_map(seed: int = 0, batch: int = 1, height: int = SIZE, width: int = SIZE) -> Tensor:
    return random_maps(seed, batch, height, width)


def add_trained(
    controller: Controller, name: str, seed: int = 0, encoder: EncoderConfig | None = None, **config: object
) -> None:
    """A LoCO adapter that looks trained: small random weights everywhere."""
    controller.add_adapter(name, LoCOConfig(r=2, num_rotations=2, **config), encoder=encoder)
    randomise(controller, name, seed)
