"""From names to pictures: load a base and its adapters, and draw pictures with and without control.

session = open_session()
session.load_adapters({"canny": None})
picture = session.generate(["a red cube"], [0], maps={"canny": edges})[0]
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from loco_diffusion.bases import is_packaged, load_base
from loco_diffusion.control import ConditionMap, Controller, family_of, resize_map
from loco_diffusion.control.family import Pipeline
from loco_diffusion.control.sampling import Sampling
from loco_diffusion.embedded import DEFAULT_BASE, GUIDANCE, STEPS, packaged_adapter
from loco_diffusion.errors import UserError
from loco_diffusion.images import to_pil, to_tensor

PACKAGED_SIZE = 128
"""Side in pixels of the pictures that the packaged bases draw."""

MAX_SIDE = 4096
"""Longest side, in pixels, that a picture may have; no supported base was trained on longer ones."""


class Session:
    """A loaded base model with its controller.

    Args:
        pipe: the stock pipeline.
        defaults: the size, steps and guidance that suit the base.
        controller: of the pipeline; default: a new one.
        packaged: name of the packaged base whose adapters are loaded where no other is named.

    Raises:
        UserError: the pipeline's denoiser is of no known family.
    """

    def __init__(
        self,
        pipe: Pipeline,
        defaults: Sampling,
        controller: Controller | None = None,
        packaged: str = DEFAULT_BASE,
    ) -> None:
        self.pipe = pipe
        self.controller = controller or Controller(pipe)
        self.defaults = defaults
        self.packaged = packaged

    @property
    def token_pixels(self) -> int:
        """What widths and heights must be multiples of."""
        return self.controller.family.token_pixels(self.pipe)

    def load_adapters(self, adapters: Mapping[str, str | os.PathLike[str] | None]) -> None:
        """Load an adapter for each condition, under the condition's name.

        Args:
            adapters: by condition: a folder, a hub id, or None for the packaged adapter.

        Raises:
            UserError: an adapter is missing or damaged, or was trained for another base or condition.
        """
        for condition, source in adapters.items():
            chosen = packaged_adapter(condition, self.packaged) if source is None else source
            self.controller.load_adapter(chosen, condition)
            trained_for = self.controller.adapters[condition].condition
            if trained_for != condition:
                self.controller.delete_adapter(condition)
                raise UserError(
                    f"The adapter {source or 'in the package'} was trained for {trained_for}, not for "
                    f"{condition}; use it for {trained_for}."
                )

    def sampling(
        self,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Sampling:
        """The defaults with changes; width and height are rounded to the nearest usable size.

        Raises:
            UserError: a number is out of its range.
        """
        token = self.token_pixels
        for name, side in {"width": width, "height": height}.items():
            if side is not None and not token <= side <= MAX_SIDE:
                raise UserError(f"The {name} must be from {token} to {MAX_SIDE} px, got {side}.")
        if steps is not None and steps < 1:
            raise UserError(f"The steps must be at least 1, got {steps}.")
        if guidance is not None and not 0 <= guidance <= 100:
            raise UserError(f"The guidance must be from 0 to 100, got {guidance:g}.")

        def rounded(side: int) -> int:
            return max(token, (side + token // 2) // token * token)

        default = self.defaults
        return Sampling(
            width=default.width if width is None else rounded(width),
            height=default.height if height is None else rounded(height),
            steps=default.steps if steps is None else steps,
            guidance=default.guidance if guidance is None else guidance,
        )

    def check_prompt_length(self, prompt: str) -> None:
        """Raise UserError if the base would not read the end of the prompt."""
        family = self.controller.family
        count, limit = family.prompt_length(self.pipe, prompt), family.text_length(self.pipe)
        if count > limit:
            raise UserError(
                f"The prompt has {count} tokens, but this model reads only the first {limit}; shorten it."
            )

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: Sampling | None = None,
        *,
        maps: Mapping[str, ConditionMap] | None = None,
        strength: float | Mapping[str, float] = 1.0,
        on_step: Callable[[int, int], None] | None = None,
    ) -> list[Image.Image]:
        """Draw a batch of pictures.

        Args:
            prompts: one for each picture, "" for a picture of anything.
            seeds: one for each picture; with the same seed a picture starts from the same noise in any batch
                and on any device.
            sampling: default: `defaults`.
            maps: ready condition maps by adapter name, of the picture's size; none is no control.
            strength: one for all maps, or by name.
            on_step: called after each step with the steps done and their total.

        Returns:
            RGB pictures in the order of the prompts.

        Raises:
            UserError: a map or strength is not usable, memory does not suffice, or the picture has NaN.
        """
        chosen = sampling or self.defaults
        family = self.controller.family

        def report(pipe: Pipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(step + 1, chosen.steps)
            return {}

        try:
            with self.controller(maps, strength=strength):
                drawn = self.pipe(
                    prompt=list(prompts),  # not the first argument of every pipeline
                    height=chosen.height,
                    width=chosen.width,
                    num_inference_steps=chosen.steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    output_type="pt",
                    **self._stock_arguments(report),
                    **family.guidance_arguments(self.pipe, chosen.guidance, len(prompts)),
                ).images
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"The memory does not suffice for {len(prompts)} x {chosen.width}x{chosen.height} px; "
                "draw smaller pictures."
            ) from error
        return [to_pil(picture) for picture in drawn]

    def _stock_arguments(self, report: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """Arguments that not every pipeline's call has."""
        wanted = {
            "callback_on_step_end": report,
            # As much of a prompt as `check_prompt_length` allows; tokenizers alone decide where there is no limit.
            "max_sequence_length": self.controller.family.text_length(self.pipe),
            "use_resolution_binning": False,  # would draw another size, and scale it
        }
        known = inspect.signature(type(self.pipe).__call__).parameters
        return {name: value for name, value in wanted.items() if name in known}

    def reconstruct(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """RGB pictures of one size through the base's VAE and back: the best that any control could do.

        Width and height must be multiples of `token_pixels`.
        """
        stack = torch.stack([to_tensor(picture) for picture in pictures])
        family = self.controller.family
        decoded = family.decode_latents(self.pipe, family.encode_pictures(self.pipe, stack))
        return [to_pil(picture) for picture in decoded]


def open_session(model: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None) -> Session:
    """Load a base model onto the accelerator, if there is one.

    A model that does not fit into the accelerator's free memory whole is kept in main memory, and its parts
    are sent over one after the other (diffusers' model offloading).

    Args:
        model: as for `load_base`.
        dtype: to compute in; default: float32 for packaged bases, bfloat16 for others.

    Raises:
        UserError: the model is missing, damaged or of no known family.
    """
    packaged = is_packaged(model)
    pipe = load_base(model, dtype or (torch.float32 if packaged else torch.bfloat16))
    pipe.set_progress_bar_config(disable=True)
    defaults = default_sampling(pipe, packaged)
    _place(pipe)
    name = os.fspath(model) if packaged and model is not None else DEFAULT_BASE
    return Session(pipe, defaults, packaged=name)


def default_sampling(pipe: Pipeline, packaged: bool) -> Sampling:
    """The size, steps and guidance that suit a base, the packaged one or any other.

    Raises:
        UserError: the pipeline's denoiser is of no known family.
    """
    if packaged:
        return Sampling(PACKAGED_SIZE, PACKAGED_SIZE, STEPS, GUIDANCE)
    return family_of(pipe).default_sampling(pipe)


def fit_map(image: Image.Image, condition: str, width: int, height: int) -> Image.Image:
    """Bring a ready condition map to a picture's size: the centre is cropped to its shape, then resized.

    Args:
        image: an RGB map of any size.
        condition: its name, which decides how it is resized: see `loco_diffusion.control.resize_map`.
        width: in pixels.
        height: in pixels.
    """
    scale = max(width / image.width, height / image.height)
    crop_width, crop_height = round(width / scale), round(height / scale)
    left, top = (image.width - crop_width) // 2, (image.height - crop_height) // 2
    cropped = image.crop((left, top, left + crop_width, top + crop_height))
    return to_pil(resize_map(to_tensor(cropped)[None], condition, height, width)[0])


def _place(pipe: Pipeline) -> None:
    """Move a pipeline to the accelerator, whole or part by part."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    size = sum(parameter.nbytes for part in parts for parameter in part.parameters())
    if device.type == "cuda" and size > 0.9 * torch.cuda.mem_get_info()[0]:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
