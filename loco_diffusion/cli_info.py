"""The command that looks into adapters: loco-diffusion info."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from loco_diffusion.cli_adapters import NAME, Adapter, check_new, load_on_base, packaged_base_of
from loco_diffusion.console import progress_bars, quiet_libraries, say
from loco_diffusion.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig

    from loco_diffusion.adapters.inspection import Inspection
    from loco_diffusion.adapters.peft_folder import PeftFolder

_LONGEST = 200  # of the targets, in letters


def info(
    adapter: Adapter,
    plot: Annotated[
        Path | None, typer.Option(help="Picture file to draw every layer's values into, such as angles.png.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_HUB_ID",
            help="Its base model, to count intruder dimensions; default: its packaged one, for LoRAs.",
        ),
    ] = None,
) -> None:
    """Show what is in an adapter, and how far it turns each layer.

    The bars are a layer's largest angle, from the first block to the last; for a LoRA, the largest singular value
    of its change. R Rᵀ - I is the norm of a layer's error of orthogonality, the largest of a row. Intruder
    dimensions (arXiv 2410.21228) are leading singular vectors of the adapted weights that are unlike all of the
    base model's.
    """
    from loco_diffusion import spectra
    from loco_diffusion.adapters import peft_folder
    from loco_diffusion.adapters.inspection import inspect
    from loco_diffusion.control import adapter_folder
    from loco_diffusion.control.layers import method_name
    from loco_diffusion.images import check_output, save_image

    quiet_libraries()
    if plot is not None:
        check_new(check_output(plot))
    folder = peft_folder.find(adapter)
    content = adapter_folder.read_any(folder)
    inspection = inspect(content.method, content.adapter)
    if plot is not None and inspection is None:
        raise UserError(
            f"There is nothing to plot of a {method_name(content.method)} adapter; leave out --plot."
        )
    rows = _summary(folder, content) | _orthogonality(inspection) | _intruders(folder, content, model)
    terminal = Console(markup=False, highlight=False)
    if not terminal.is_terminal:
        terminal.width = 120  # for files and pipes
    table = Table.grid(padding=(0, 3))
    for name, value in rows.items():
        table.add_row(name, value)
    terminal.print(table)
    if inspection is not None:
        what = inspection.spectra, inspection.quantity, inspection.unit
        terminal.print()
        terminal.print(spectra.table(*what, inspection.orthogonality_errors, terminal.options.ascii_only))
        if plot is not None:
            save_image(spectra.picture(*what, f"{folder.resolve().name}: {rows['settings']}"), plot)
            say(f"\nWrote {plot}")


def _summary(folder: Path, content: PeftFolder) -> dict[str, str]:
    """What the adapter's files say."""
    from loco_diffusion.adapters.inspection import layers_of, trained_parameters
    from loco_diffusion.control import adapter_folder
    from loco_diffusion.control.layers import method_name

    method, weights = content.method, content.adapter
    targets = getattr(method, "target_modules", None) or "not named"
    targets = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    size = sum((folder / file).stat().st_size for file in adapter_folder.FILES if (folder / file).exists())
    parameters = (
        f"{trained_parameters(method, weights):,} trainable in {len(layers_of(method, weights))} layers"
    )
    rows = {
        "method": method_name(method).lower(),
        "settings": ", ".join(_settings(method)),
        "base": method.base_model_name_or_path or "not named",
        "targets": targets if len(targets) <= _LONGEST else f"{targets[:_LONGEST]} ...",
        "parameters": parameters,
        "files": f"{size / 1e6:.2f} MB",
    }
    if isinstance(content, adapter_folder.AdapterFolder):
        control, encoder = content.control, sum(tensor.numel() for tensor in content.encoder.values())
        rows |= {
            "base": " ".join(
                filter(None, (control.base.denoiser, control.base.name_or_path, control.base.revision))
            ),
            "condition": control.condition,
            "route": control.route,
        }
        if control.encoder is not None:
            rows["parameters"] = f"{parameters}, {encoder:,} in the encoder"
            rows["encoder"] = f"{control.encoder.input}, {control.encoder.hidden_size} wide"
    return rows


def _settings(method: PeftConfig) -> list[str]:
    """The method's own settings that are numbers or words; of peft's own methods those that are not the default."""
    from peft import PeftConfig

    from loco_diffusion.adapters.config import AdapterConfig

    common = {field.name for field in dataclasses.fields(PeftConfig)} | {"target_modules", "bias"}
    settings = []
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name in common or not value or not isinstance(value, (int, float, str)) or value is True:
            continue
        if isinstance(method, AdapterConfig) or field.name == "r" or value != field.default:
            settings.append(f"{field.name} {value}")
    return settings


def _orthogonality(inspection: Inspection | None) -> dict[str, str]:
    if inspection is None or not inspection.orthogonality_errors:
        return {}
    errors = inspection.orthogonality_errors
    worst = max(errors, key=lambda path: errors[path])
    return {"orthogonality": f"‖R Rᵀ - I‖ at most {errors[worst]:.1e} ({worst})"}


def _intruders(folder: Path, content: PeftFolder, model: str | None) -> dict[str, str]:
    """Counted if there is a base model: the one that is named, or the packaged one of LoRAs."""
    from peft import LoraConfig

    from loco_diffusion.adapters.inspection import THRESHOLD, TOP, count_intruders, layers_of

    if model is None and not (isinstance(content.method, LoraConfig) and packaged_base_of(content)):
        return {}
    with progress_bars() as progress:
        total = len(layers_of(content.method, content.adapter))
        task = progress.add_task("Counting intruder dimensions", total=total)
        try:
            _, denoiser = load_on_base(folder, content, model)
        except UserError:
            if model is None:  # another base of this name
                return {}
            raise
        counts = {}
        for path, count in count_intruders(denoiser, NAME):
            counts[path] = count
            progress.advance(task)
    worst = max(counts, key=lambda path: counts[path])
    text = f"{sum(counts.values())} of {TOP * len(counts)} leading singular vectors (cosines below {THRESHOLD:g})"
    if counts[worst]:
        text += f", at most {counts[worst]} of {TOP} in a layer ({worst})"
    return {"intruders": text}
