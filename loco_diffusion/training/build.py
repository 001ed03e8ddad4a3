"""From a configuration to the things it names: data, pipeline, controller with a fresh adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from loco_diffusion.adapters import LocationSchedule, default_target_modules
from loco_diffusion.adapters.targets import DENOISERS, PRESETS
from loco_diffusion.control.controller import Controller
from loco_diffusion.control.encoder import EncoderConfig, TokensConfig
from loco_diffusion.control.family import family_of
from loco_diffusion.data.hub import Columns, DatasetSource, StreamSource
from loco_diffusion.data.sources import FolderSource, SceneSource, Source
from loco_diffusion.data.tars import TarSource
from loco_diffusion.errors import UserError
from loco_diffusion.training.config import TrainingConfig
from loco_diffusion.training.data_config import Data, FolderData, ScenesData, TarData

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def build_source(data: Data) -> Source | StreamSource:
    """Open the pictures.

    Raises:
        UserError: they are missing or malformed.
    """
    if isinstance(data, ScenesData):
        return SceneSource(data.count, data.size)
    if isinstance(data, FolderData):
        return FolderSource(data.path, data.map_field)
    if isinstance(data, TarData):
        return TarSource(data.path, data.image_member, data.caption_member, data.map_member)
    columns = Columns(data.image_column, data.caption_column, data.map_column)
    return (StreamSource if data.streaming else DatasetSource)(data.name, data.split, columns)


def build_controller(config: TrainingConfig, pipe: DiffusionPipeline) -> Controller:
    """A controller of `pipe` with a fresh adapter, named after its condition.

    Raises:
        UserError: the pipeline is not supported, the picture size does not suit it, or its denoiser does not
            take the adapter.
    """
    family = family_of(pipe)
    denoiser = type(family.denoiser(pipe)).__name__
    token = family.token_pixels(pipe) * (config.tokens.stride if config.tokens else 1)
    data = config.data
    for name in ("size", "aspect_step") if len(data.framing.sizes) > 1 else ("size",):
        if getattr(data, name) % token:
            raise UserError(
                f"data.{name} is {getattr(data, name)}, but this base needs a multiple of {token}; "
                f"use {max(1, getattr(data, name) // token) * token}."
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
        condition_options=config.condition_options,
        encoder=None if config.tokens else EncoderConfig(**config.encoder.model_dump()),
        tokens=TokensConfig(**config.tokens.model_dump()) if config.tokens else None,
    )
    return controller


def build_schedule(config: TrainingConfig, denoiser: nn.Module) -> LocationSchedule | None:
    """What tells a LoCA adapter when to learn its locations; other methods learn all at once."""
    if config.adapter.method != "loca":
        return None
    return LocationSchedule(denoiser, config.steps, config.condition)
