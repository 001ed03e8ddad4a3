"""From a configuration to the things it names: data, pipeline, controller with a fresh adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from loco_diffusion.adapters import LocationSchedule, default_target_modules
from loco_diffusion.adapters.targets import DENOISERS, PRESETS
from loco_diffusion.control.controller import Controller
from loco_diffusion.control.encoder import EncoderConfig, TokensConfig
from loco_diffusion.control.family import family_of
from loco_diffusion.data.sources import DatasetSource, FolderSource, SceneSource, Source
from loco_diffusion.errors import UserError
from loco_diffusion.training.config import DatasetData, FolderData, ScenesData, TrainingConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def build_source(data: ScenesData | FolderData | DatasetData) -> Source:
    """Open the pictures.

    Raises:
        UserError: they are missing or malformed.
    """
    if isinstance(data, ScenesData):
        return SceneSource(data.count, data.size)
    if isinstance(data, FolderData):
        return FolderSource(data.path, data.size)
    return DatasetSource(data.name, data.split, data.image_column, data.caption_column, data.size)


def build_controller(config: TrainingConfig, pipe: DiffusionPipeline) -> Controller:
    """A controller of `pipe` with a fresh adapter, named after its condition.

    Raises:
        UserError: the pipeline is not supported, the picture size does not suit it, or its denoiser does not
            take the adapter.
    """
    family = family_of(pipe)
    denoiser = type(family.denoiser(pipe)).__name__
    token = family.token_pixels(pipe) * (config.tokens.stride if config.tokens else 1)
    if config.data.size % token:
        raise UserError(
            f"data.size is {config.data.size}, but this base needs a multiple of {token}; "
            f"use {max(1, config.data.size // token) * token}."
        )
    targets = config.adapter.target_modules
    if isinstance(targets, str) and targets in PRESETS:
        known = default_target_modules(denoiser, targets)
        if known is None:
            raise UserError(
                f"adapter.target_modules {targets!r} is known for {', '.join(DENOISERS)} only; "
                f"name the linear layers of {denoiser}."
            )
        targets = known
    controller = Controller(pipe)
    controller.add_adapter(
        config.condition,
        config.adapter.peft_config(targets),
        condition=config.condition,
        encoder=None if config.tokens else EncoderConfig(**config.encoder.model_dump()),
        tokens=TokensConfig(**config.tokens.model_dump()) if config.tokens else None,
    )
    return controller


def build_schedule(config: TrainingConfig, denoiser: nn.Module) -> LocationSchedule | None:
    """What tells a LoCA adapter when to learn its locations; other methods learn all at once."""
    if config.adapter.method != "loca":
        return None
    return LocationSchedule(denoiser, config.steps, config.condition)
