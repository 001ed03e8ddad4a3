"""FLUX.1 with LoCO control: the stock pipeline with condition maps.

    pipe = FluxLoCOControlPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", dtype=torch.bfloat16)
    pipe.load_control_adapter("path/to/canny")
    image = pipe("a red cube", control={"canny": edges}, control_strength=0.8).images[0]

or, without this file on the path:

    pipe = DiffusionPipeline.from_pretrained(
        "black-forest-labs/FLUX.1-dev", custom_pipeline=".../flux_loco_control.py", trust_remote_code=True
    )
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from diffusers import FluxPipeline
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput

from loco_diffusion.control import ConditionMap, Controller, map_tensor, resize_map


class FluxLoCOControlPipeline(FluxPipeline):
    """FluxPipeline whose call takes condition maps; it has the same components and no others."""

    # No __init__: FluxPipeline's own, whose annotations from_pipe reads, is the right one.

    @cached_property
    def controller(self) -> Controller:
        """The Controller of this pipeline, for adding, saving, fusing and deleting adapters."""
        return Controller(self)

    def load_control_adapter(self, path: str | os.PathLike[str], adapter_name: str | None = None) -> str:
        """Load an adapter.

        Args:
            path: the adapter's folder, or the id of a Hugging Face Hub repository.
            adapter_name: its name in `control`; default: the condition it was trained for.

        Returns:
            The name.

        Raises:
            UserError: the adapter is damaged or for another base model; the pipeline stays as it was.
        """
        return self.controller.load_adapter(path, adapter_name)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the base as a stock FluxPipeline, without adapters (they have `controller.save_adapter`).

        Raises:
            UserError: an adapter is fused.
        """
        has_denoiser = self.transformer is not None  # type: ignore[attr-defined]
        with self.controller.without_adapters() if has_denoiser else nullcontext():
            stock = FluxPipeline(**self.components)  # type: ignore[attr-defined]
            stock.save_pretrained(  # type: ignore[attr-defined]
                save_directory,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
                push_to_hub=push_to_hub,
                **kwargs,
            )

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        control: Mapping[str, ConditionMap] | None = None,
        control_strength: float | Mapping[str, float] = 1.0,
        *,
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_ip_adapter_image: PipelineImageInput | None = None,
        negative_ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        max_sequence_length: int | None = None,
    ) -> FluxPipelineOutput | tuple[Any, ...]:
        """Generate under condition maps; every argument not named here is FluxPipeline's.

        Args:
            prompt: one prompt or a list of them.
            control: ready condition maps by adapter name: each a PIL picture, a list of them (as many as
                prompts), or a float tensor (B, 3, H, W) in [0, 1]. A map of another size than height x width
                is resized, stretched if need be, in the way that keeps the condition's look: see
                `loco_diffusion.control.resize_map`. A map extracted at the right size is better.
            control_strength: one for all maps or by name; 0 is no control, 1 is as trained.
            height: in pixels; default: the first map's, rounded down to a whole token, else FluxPipeline's.
            width: as height.
            callback_on_step_end_tensor_inputs: default: latents.
            max_sequence_length: tokens of the prompt; default: the second tokenizer's limit, at most 512.

        Returns:
            FluxPipelineOutput with `images`, or a tuple with them as its first element.

        Raises:
            UserError: an unknown adapter name, or a map or strength that is not usable.
        """
        maps = {name: map_tensor(value, name) for name, value in (control or {}).items()}
        token = self.controller.family.token_pixels(self)
        for default in list(maps.values())[:1]:
            height = height or max(token, default.shape[-2] // token * token)
            width = width or max(token, default.shape[-1] // token * token)
        adapters = self.controller.adapters
        for name in maps.keys() & adapters.keys():  # the controller refuses names that are unknown
            assert height and width
            # FluxPipeline rounds down, too.
            size = (max(1, side // token) * token for side in (height, width))
            maps[name] = resize_map(maps[name], adapters[name].condition, *size)
        with self.controller(maps, strength=control_strength):
            return super().__call__(  # type: ignore[misc]
                prompt=prompt,
                prompt_2=prompt_2,
                negative_prompt=negative_prompt,
                negative_prompt_2=negative_prompt_2,
                true_cfg_scale=true_cfg_scale,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                sigmas=sigmas,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=latents,
                prompt_embeds=prompt_embeds,
                pooled_prompt_embeds=pooled_prompt_embeds,
                ip_adapter_image=ip_adapter_image,
                ip_adapter_image_embeds=ip_adapter_image_embeds,
                negative_ip_adapter_image=negative_ip_adapter_image,
                negative_ip_adapter_image_embeds=negative_ip_adapter_image_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
                output_type=output_type,
                return_dict=return_dict,
                joint_attention_kwargs=joint_attention_kwargs,
                callback_on_step_end=callback_on_step_end,
                callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs or ["latents"],
                max_sequence_length=max_sequence_length or self.controller.family.text_length(self),
            )
