"""What the base's models make of pictures, condition maps and captions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loco_diffusion.control import MapTokens, map_tokens, resize_map
from loco_diffusion.control.family import unwrapped
from loco_diffusion.training.config import TrainingConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from loco_diffusion.control.family import Family


class Encoding:
    """The VAE and the text encoders of a run.

    Args:
        config: the run.
        family: of the pipeline.
        pipe: whose models are used.
        device: where they are, and where results are.
    """

    def __init__(
        self, config: TrainingConfig, family: Family, pipe: DiffusionPipeline, device: torch.device
    ) -> None:
        self.condition = config.condition
        self.input = config.encoder.input if config.tokens is None else "latents"
        self.stride = config.tokens.stride if config.tokens else 1
        self.family = family
        self.pipe = pipe
        self.device = device
        denoiser = family.denoiser(pipe)
        self.text_encoders: dict[str, nn.Module] = {
            name: part
            for name, part in pipe.components.items()
            if isinstance(part, nn.Module) and name != "vae" and unwrapped(part) is not denoiser
        }
        self.empty_text = self.text([""])

    @property
    def per_prompt(self) -> list[str]:
        """Names of the text tensors with one row a prompt; the others are the same for all prompts."""
        return [name for name, values in self.empty_text.items() if values.shape[0] == 1]

    @torch.no_grad()
    def pictures(self, pictures: Tensor) -> Tensor:
        """Latents, (B, C, h, w), of pictures, uint8 (B, 3, H, W)."""
        return self.family.encode_pictures(self.pipe, self.to_device(pictures).float() / 255)

    @torch.no_grad()
    def maps(self, maps: Tensor) -> MapTokens:
        """Condition maps, uint8 (B, 3, H, W), as the adapter's encoder reads them."""
        pictures = self.to_device(maps).float() / 255
        height, width = (side // self.stride for side in pictures.shape[-2:])
        resized = resize_map(pictures, self.condition, height, width)
        return map_tokens(self.family, self.pipe, resized, self.input)

    def map_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tokens of maps of a width and a height."""
        side = self.family.token_pixels(self.pipe) * self.stride
        return size[1] // side, size[0] // side

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the denoiser needs to know of captions."""
        # Pipelines print every caption that they cut: most of them, where a text encoder reads little.
        loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            return self.family.encode_prompts(self.pipe, list(captions))
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

    def to_device(self, tensor: Tensor) -> Tensor:
        """The tensor where batches go."""
        return tensor.to(self.device, non_blocking=True)
