"""The commands that make adapters of adapters: loco-diffusion export | merge."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from loco_diffusion.console import note, progress_bars, quiet_libraries, say
from loco_diffusion.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from loco_diffusion.adapters.peft_folder import PeftFolder

NAME = "adapter"  # of an adapter in its base model
_LORA_FILE = ".safetensors"

Adapter = Annotated[str, typer.Argument(metavar="DIR_OR_HUB_ID", help="Adapter folder or hub id.")]


def export(
    adapter: Adapter,
    out: Annotated[
        Path, typer.Option(help="New folder, which keeps the condition encoder, or new .safetensors file.")
    ],
    rank: Annotated[
        int | None, typer.Option(min=1, help="Truncate to this rank; default: the exact one.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="DIR_OR_HUB_ID", help="Its base model; default: its packaged one.")
    ] = None,
) -> None:
    """Write a LoCO or LOFT adapter as a LoRA that gives the same pictures.

    A .safetensors file is in diffusers' format, for load_lora_weights; it has no condition encoder. A folder is
    again an adapter for generate --adapter and for peft. Adapters with learned magnitudes, and those of
    convolutions that are dilated or do not pad with zeros, cannot be exported. For example:

    loco-diffusion export path/to/canny --out canny-lora
    """
    from loco_diffusion.adapters import peft_folder
    from loco_diffusion.adapters.export import lora_config, to_lora, truncate, write_lora_file
    from loco_diffusion.control import adapter_folder

    quiet_libraries()
    check_new(out)
    folder = peft_folder.find(adapter)
    content = adapter_folder.read_any(folder)
    with progress_bars() as progress:
        progress.add_task("Exporting", total=None)
        component, denoiser = load_on_base(folder, content, model)
        state = to_lora(denoiser, NAME)
    accuracy = "exact"
    if rank is not None:
        state, errors, error = truncate(state, rank)
        worst = max(errors, key=lambda path: errors[path])
        accuracy = f"relative error {error:.2g}, at most {errors[worst]:.2g} in a layer ({worst})"
    config = lora_config(state)
    if out.suffix == _LORA_FILE:
        write_lora_file(out, state, component)
        if isinstance(content, adapter_folder.AdapterFolder):
            note("The file has no condition encoder; to control pictures with the LoRA, export to a folder.")
    else:
        adapter_folder.write(out, dataclasses.replace(content, method=config, adapter=state))
    say(f"Wrote {out} (rank {config.r}, {accuracy})")


def merge(
    adapters: Annotated[list[str], typer.Argument(metavar="DIR_OR_HUB_ID...", help="Two or more adapters.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    method: Annotated[
        Literal["compose", "lie"],
        typer.Option(help="compose: the product of the rotations. lie: the sum of their generators."),
    ] = "compose",
    weights: Annotated[
        str | None,
        typer.Option(metavar="NUMBER,...", help="Strength of each adapter in the merged one; default: 1."),
    ] = None,
) -> None:
    """Merge LoCO adapters, or LOFT adapters, of one base model into one.

    compose does what the adapters do together; lie also takes means. Adapters with condition encoders must be for
    the same condition. For example:

    loco-diffusion merge run1/adapter run2/adapter --method lie --weights 0.5,0.5 --out mean
    """
    from loco_diffusion.adapters import peft_folder
    from loco_diffusion.control import adapter_folder
    from loco_diffusion.control.merging import merge_folders

    quiet_libraries()
    if len(adapters) < 2:
        raise UserError("There is only one adapter to merge; give two or more.")
    strengths = _strengths(weights, len(adapters))
    check_new(out)
    contents = [adapter_folder.read_any(peft_folder.find(adapter)) for adapter in adapters]
    adapter_folder.write(out, merge_folders(contents, method, strengths))
    say(f"Wrote {out}")


def check_new(out: Path) -> None:
    """Raise UserError, before any costly work, if something is at this path or nothing can be written there."""
    from loco_diffusion.control.adapter_folder import check_target

    if out.exists():
        raise UserError(f"{out} exists; choose another path.")
    check_target(out)


def _strengths(weights: str | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    try:
        strengths = [float(text) for text in weights.split(",")]
    except ValueError:
        strengths = []
    if len(strengths) != count or not all(map(math.isfinite, strengths)):
        raise UserError(
            f"--weights {weights!r} must be {count} finite numbers, one for each adapter, separated by commas; "
            "try " + ",".join(["0.5"] * count) + "."
        )
    return strengths


def packaged_base_of(content: PeftFolder) -> str | None:
    """Name of the packaged base that an adapter says it was trained on, None if it names another."""
    from loco_diffusion.control.adapter_folder import AdapterFolder
    from loco_diffusion.embedded import PACKAGED_BASES

    if not isinstance(content, AdapterFolder):
        return None
    name = content.control.base.name_or_path
    return name if name in PACKAGED_BASES else None


def load_on_base(folder: Path, content: PeftFolder, model: str | None) -> tuple[str, nn.Module]:
    """A base model's denoiser with an adapter in its layers, called NAME; the rest of the model is not loaded.

    Args:
        folder: of the adapter.
        content: what is in the folder.
        model: as for `load_base`; None for the packaged base that the adapter names.

    Returns:
        What the base's pipeline calls the denoiser, and the denoiser.

    Raises:
        UserError: the base model cannot be loaded, or the adapter does not fit it.
    """
    from loco_diffusion.bases import load_denoiser
    from loco_diffusion.control import layers
    from loco_diffusion.control.adapter_folder import AdapterFolder, check_denoiser

    component, denoiser = load_denoiser(model or packaged_base_of(content))
    if isinstance(content, AdapterFolder):
        check_denoiser(folder, content.control.base, denoiser)
    try:
        layers.inject(denoiser, content.method, NAME)
        layers.set_weights(denoiser, NAME, content.adapter)
    except UserError as error:
        raise UserError(
            f"{folder} does not fit the base model; give its own with --model ({error})"
        ) from error
    return component, denoiser
