"""How fast adapters are, and how much memory they take, beside peft's.

    python benchmarks/adapter_speed.py
    python benchmarks/adapter_speed.py --device cuda
    python benchmarks/adapter_speed.py --width 128 --tokens 32 --text-tokens 16 --rank 8 --repeats 2    # a trial

Every method adapts the same frozen bfloat16 weights with about as many parameters as a LoRA of --rank: one
linear layer of width x width, and a double and a single block of FLUX.1 (see workloads.py). Measured are

- forward: in training mode, with gradients recorded,
- step: forward and backward,
- evaluation: in eval mode without gradients, where methods may keep what they computed,
- peak memory: of a step, over what the process had before it built the model, each method in its own process.

All methods run in turn within each repetition. A ratio is the median over the repetitions of a method's time
over LoRA's (in evaluation: over the bare layer's) in the same repetition. With float32 adapters, the default,
the model runs under bfloat16 autocast as in mixed-precision training. Writes WORKLOAD-DEVICE-DTYPE.json and .md
into the folder adapter_speed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
import typer
from memory import in_new_process, peak_over
from methods import BARE, METHODS, REFERENCE, Adapted, adapt
from output import RESULTS, describe, write
from timing import in_turn, paired_ratio
from torch import Tensor, nn
from workloads import WORKLOADS, Workload

from loco_diffusion.console import quiet_libraries
from loco_diffusion.machine import describe_machine

PACKAGES = ("torch", "peft", "diffusers")
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """The size of the measurement."""

    width: int
    tokens: int
    text_tokens: int
    rank: int
    repeats: int
    device: str
    adapter_dtype: Literal["float32", "bfloat16"]

    def workload(self, name: str) -> Workload:
        return WORKLOADS[name](self.width, self.tokens, self.text_tokens, self.device)

    def adapt(self, workload: Workload, method: str) -> Adapted:
        dtype = getattr(torch, self.adapter_dtype)
        return adapt(workload.base, method, self.rank, self.width, workload.targets, dtype)

    def run(self, workload: Workload, model: nn.Module) -> Tensor:
        autocast = self.adapter_dtype == "float32"
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=autocast):
            return workload.run(model)


def main(
    width: Annotated[int, typer.Option(help="Of the layers; a multiple of 128.")] = 3072,
    tokens: Annotated[int, typer.Option(help="Image tokens.")] = 1024,
    text_tokens: Annotated[int, typer.Option(help="Text tokens, in the blocks.")] = 512,
    rank: Annotated[int, typer.Option(help="Of the LoRA, a multiple of 8.")] = 16,
    repeats: Annotated[int, typer.Option(help="Repetitions; medians count.")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    adapter_dtype: Annotated[str, typer.Option(help="float32 (under autocast) or bfloat16.")] = "float32",
    method: Annotated[
        list[str] | None, typer.Option(help=f"Only these of {', '.join(METHODS)}; repeatable.")
    ] = None,
    workload: Annotated[
        list[str] | None, typer.Option(help=f"Only these of {', '.join(WORKLOADS)}; repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS / "adapter_speed",
) -> None:
    """Measure adapters and write the numbers and a table."""
    if adapter_dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter(f"--adapter-dtype is float32 or bfloat16, not {adapter_dtype}.")
    methods = [BARE, *(m for m in METHODS if m in _known(method, METHODS) or m == REFERENCE)]
    settings = Settings(width, tokens, text_tokens, rank, repeats, device, adapter_dtype)  # type: ignore[arg-type]
    quiet_libraries()
    machine = describe_machine(device, PACKAGES)
    out.mkdir(parents=True, exist_ok=True)
    for name in _known(workload, WORKLOADS):
        rows = in_new_process(measure_time, name, methods, settings)  # whose memory is free again afterwards
        results = {"workload": name, "settings": asdict(settings), "machine": machine, "rows": rows}
        path = out / f"{name}-{device}-{adapter_dtype}.json"
        write(results, path, to_markdown)  # the times, should the slower part be cut off
        for row in rows:
            if "error" not in row:
                typer.echo(f"{name}, memory: {row['method']}")
                with suppress(BrokenProcessPool):  # killed, for its memory as a rule: the times still count
                    row["peak_bytes"] = in_new_process(peak_of_step, name, row["method"], settings)
                write(results, path, to_markdown)
        typer.echo(f"Wrote {path} and {path.with_suffix('.md')}.")


def _known(wanted: list[str] | None, names: dict[str, Any]) -> list[str]:
    for name in wanted or ():
        if name not in names:
            raise typer.BadParameter(f"{name} is none of {', '.join(names)}.")
    return wanted or list(names)


def measure_time(name: str, methods: list[str], settings: Settings) -> list[Row]:
    """A row for each method on one workload; a method that cannot run it has its error there."""
    workload = settings.workload(name)
    rows: dict[str, Row] = {method: {"method": method} for method in methods}
    models: dict[str, nn.Module] = {}
    for method, row in rows.items():
        typer.echo(f"{name}: {method}")
        try:
            model, row["parameters"] = settings.adapt(workload, method)
            for mode, run in MODES.items():  # warms up, and shows whether it runs at all
                run(settings, workload, model.train(mode != "evaluation"))
            models[method] = model
        except Exception as error:  # of another library, on this device, at this size: the others still count
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for mode, run in MODES.items():
        typer.echo(f"{name}, {mode}")
        runs = {
            method: partial(run, settings, workload, model.train(mode != "evaluation"))
            for method, model in models.items()
        }
        samples = in_turn(runs, settings.repeats, settings.device, warm_ups=0)
        reference = samples[BARE if mode == "evaluation" else REFERENCE]
        for method, times in samples.items():
            ratio = paired_ratio(times, reference)
            rows[method][mode] = {"median_ms": median(times), "ratio": ratio, "samples_ms": times}
    return list(rows.values())


def forward(settings: Settings, workload: Workload, model: nn.Module) -> None:
    """A forward pass that records gradients."""
    settings.run(workload, model)


def step(settings: Settings, workload: Workload, model: nn.Module) -> None:
    """A forward and a backward pass."""
    y = settings.run(workload, model)
    y.backward(y.detach())
    model.zero_grad()


def evaluation(settings: Settings, workload: Workload, model: nn.Module) -> None:
    """A forward pass without gradients."""
    with torch.no_grad():
        settings.run(workload, model)


MODES: dict[str, Callable[[Settings, Workload, nn.Module], None]] = {
    "forward": forward,
    "step": step,
    "evaluation": evaluation,
}


def peak_of_step(name: str, method: str, settings: Settings) -> int:
    """The bytes that a model and the second of its training steps take at most."""
    quiet_libraries()
    with peak_over(settings.device) as peak:
        workload = settings.workload(name)
        model = settings.adapt(workload, method).model
        step(settings, workload, model)
        peak.restart()
        step(settings, workload, model)
    return peak.bytes


def to_markdown(results: dict[str, Any]) -> str:
    """The results as a table."""
    settings = results["settings"]
    lines = [
        f"# Speed and memory of adapters: {results['workload']}",
        "",
        f"Width {settings['width']}, {settings['tokens']} image and {settings['text_tokens']} text tokens, "
        f"{settings['adapter_dtype']} adapters about as large as LoRA's of rank {settings['rank']}. "
        f"Medians of {settings['repeats']} paired repetitions.",
        "",
        describe(results["machine"]),
        "",
        *_table(results["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    peaks = {row["method"]: row["peak_bytes"] for row in rows if "peak_bytes" in row}
    lines = [
        "| method | parameters | forward, ms (x LoRA) | step, ms (x LoRA) | evaluation, ms (x bare) | "
        "peak, MiB (x LoRA) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['method']} | {row['error'][:80].replace('|', '/')} | | | | |")
            continue
        times = [f"{row[mode]['median_ms']:.2f} ({row[mode]['ratio']:.2f})" for mode in MODES]
        peak = "not measured"
        if "peak_bytes" in row and REFERENCE in peaks:
            peak = f"{row['peak_bytes'] / 2**20:.0f} ({row['peak_bytes'] / peaks[REFERENCE]:.2f})"
        lines.append(f"| {row['method']} | {row['parameters']:,} | {' | '.join(times)} | {peak} |")
    return lines


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    typer.run(main)
