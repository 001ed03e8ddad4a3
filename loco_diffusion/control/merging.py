"""Adapter folders merged into one: the rotations, and for the same condition also its encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loco_diffusion.adapters.combine import Combination, merge_adapters
from loco_diffusion.adapters.peft_folder import PeftFolder
from loco_diffusion.control.adapter_folder import AdapterFolder, ControlConfig
from loco_diffusion.control.encoder import EncoderConfig
from loco_diffusion.errors import UserError


def merge_folders(contents: Sequence[PeftFolder], how: Combination, strengths: Sequence[float]) -> PeftFolder:
    """One adapter that does what several do together, see `adapters.combine.merge_adapters`.

    Condition encoders must be for the same condition: the merged one gives strength times features, summed up,
    exactly. So "compose" gives what a controller gives that has the same map and strength for each.

    Args:
        contents: one or more adapters of the same base, all LoCO or all LOFT, and all with a condition encoder
            or all without.
        how: "compose" or "lie".
        strengths: one for each.

    Raises:
        UserError: the adapters are for different conditions or bases, or what `merge_adapters` refuses.
    """
    adapters = [(content.method, content.adapter) for content in contents]
    controlled = [content for content in contents if isinstance(content, AdapterFolder)]
    if not controlled:
        return PeftFolder(*merge_adapters(adapters, how, strengths))
    if len(controlled) < len(contents):
        raise UserError(
            "Only some of the adapters have a condition encoder: merge those that have one, or those that do not."
        )
    control = controlled[0].control
    for other in controlled[1:]:
        _check_alike(control, other.control)
    settings = [_encoder_settings(content.control) for content in controlled]
    method, weights = merge_adapters(adapters, how, strengths)
    encoder = _merge_encoders([content.encoder for content in controlled], strengths)
    width = sum(each.hidden_size for each in settings)
    control = control.model_copy(update={"encoder": replace(settings[0], hidden_size=width)})
    return AdapterFolder(method, weights, control, encoder)


def _merge_encoders(
    encoders: Sequence[Mapping[str, Tensor]], strengths: Sequence[float]
) -> dict[str, Tensor]:
    """The weights of an encoder whose features are the sum of strength times the encoders' features."""

    def scaled(name: str) -> list[Tensor]:
        return [encoder[name] * strength for encoder, strength in zip(encoders, strengths, strict=True)]

    try:
        return {
            "input_layer.weight": torch.cat([encoder["input_layer.weight"] for encoder in encoders]),
            "input_layer.bias": torch.cat([encoder["input_layer.bias"] for encoder in encoders]),
            "output_layer.weight": torch.cat(scaled("output_layer.weight"), dim=1),
            "output_layer.bias": torch.stack(scaled("output_layer.bias")).sum(0),
        }
    except (KeyError, RuntimeError) as error:
        raise UserError(
            "A condition encoder does not match its configuration; save or download the adapters again."
        ) from error


def _check_alike(first: ControlConfig, other: ControlConfig) -> None:
    if other.condition != first.condition:
        raise UserError(
            f"The adapters are for different conditions ({first.condition} and {other.condition}), whose maps one "
            "adapter cannot tell apart: load them together instead, which adds up their control."
        )
    bases = [(control.base.denoiser, control.base.config) for control in (first, other)]
    if bases[0] != bases[1]:
        names = " and ".join(control.base.name_or_path or control.base.denoiser for control in (first, other))
        raise UserError(
            f"The adapters were trained for different base models ({names}): merge adapters of one base model."
        )
    inputs = [_encoder_settings(control).input for control in (first, other)]
    if inputs[0] != inputs[1]:
        raise UserError(
            f"The adapters' condition encoders read different things ({inputs[0]} and {inputs[1]}): load them "
            "together instead."
        )


def _encoder_settings(control: ControlConfig) -> EncoderConfig:
    if control.encoder is None:
        raise UserError(
            "Adapters of the tokens route cannot be merged into one, because each looks at its condition for "
            "itself: load them together instead."
        )
    return control.encoder
