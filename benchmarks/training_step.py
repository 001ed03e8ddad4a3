"""Where the time of a training step goes, and what it costs beside the bare model.

    python benchmarks/training_step.py loco_diffusion/embedded/adapters/canny.yaml
    python benchmarks/training_step.py flux1-dev-canny --steps 10

Runs the trainer itself under torch.profiler, which sums up the marks that it sets, and measures the frozen model's own
forward and backward pass to its input, of a batch of the same data: the least that any adapter needs. Validation is
off. Writes training_step-CONDITION-DEVICE.json and .md with the shares and the costliest operators.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from output import RESULTS, describe, write
from rich.progress import Progress
from timing import milliseconds
from torch.profiler import ProfilerActivity, profile

from loco_diffusion.bases import load_base
from loco_diffusion.console import quiet_libraries
from loco_diffusion.control import family_of
from loco_diffusion.machine import describe_machine
from loco_diffusion.training.build import build_source
from loco_diffusion.training.config import TrainingConfig, load_config, make_config
from loco_diffusion.training.examples import Examples
from loco_diffusion.training.objective import Objective
from loco_diffusion.training.packaged import find_config
from loco_diffusion.training.preparation import prepare
from loco_diffusion.training.trainer import train

PARTS = ("input", "forward", "backward", "optimizer")
PACKAGES = ("torch", "peft", "diffusers")
WARM_UPS = 2


def main(
    config: Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged configuration.")],
    steps: Annotated[int, typer.Option(min=3, help="Steps of the trainer, and repetitions.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure, and write the results."""
    quiet_libraries()
    chosen = load_config(find_config(Path(config)))
    results = measure(chosen, steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    write(results, out / f"training_step-{chosen.condition}-{device}.json", to_markdown)


def measure(config: TrainingConfig, steps: int) -> dict[str, Any]:
    """Medians in milliseconds, and what follows from them."""
    with tempfile.TemporaryDirectory() as folder:
        changes = {"output": folder, "steps": steps, "checkpoint_every": steps, "validation": {"pictures": 0}}
        parts, operators = _profiled(make_config(config.model_dump(mode="json") | changes))
    bare = _bare(config, steps)
    return {
        "config": {"base": config.base, "condition": config.condition, "batch_size": config.batch_size},
        "steps": steps,
        "machine": describe_machine("cuda" if torch.cuda.is_available() else "cpu", PACKAGES),
        "parts": parts,
        "bare": bare,
        "waiting_share": parts["input"] / sum(parts.values()),
        "over_bare": (sum(parts.values()) - parts["input"]) / bare,
        "operators": operators,
    }


def _profiled(config: TrainingConfig) -> tuple[dict[str, float], str]:
    """Milliseconds of each part of a step, and torch.profiler's table of the costliest operators."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train(config)
    events = profiler.events() or []
    parts = {}
    for part in PARTS:
        times = [event.cpu_time_total / 1000 for event in events if event.name == f"training.{part}"]
        parts[part] = median(times[WARM_UPS:])
    averages = profiler.key_averages()
    return parts, averages.table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=50)


def _bare(config: TrainingConfig, repeats: int) -> float:
    """Milliseconds of the frozen model's own forward and backward pass, to its input."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    pipe: Any = load_base(config.base, getattr(torch, config.dtype), config.quantization)
    pipe.to(device)
    family = family_of(pipe)
    family.denoiser(pipe).train().requires_grad_(False)
    examples = Examples(config, build_source(config.data), config.make_condition(), family, pipe, device)
    with Progress(disable=True) as progress:
        prepare(examples, progress)
    batch = examples.encode(examples.load(0))
    objective = Objective(config, pipe)
    batch.latents.requires_grad_(True)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision)

    def once() -> None:
        with torch.autocast(device.type, precision) if precision else nullcontext():
            loss = objective.loss(batch)
        loss.backward()

    return median([milliseconds(once, device.type) for _ in range(WARM_UPS + repeats)][WARM_UPS:])


def to_markdown(results: dict[str, Any]) -> str:
    """The results as tables."""
    parts, config = results["parts"], results["config"]
    total = sum(parts.values())
    rows = [f"| {part} | {parts[part]:.1f} | {100 * parts[part] / total:.1f} % |" for part in PARTS]
    return "\n".join(
        [
            f"# A training step: {config['condition']} on {config['base']}, batches of {config['batch_size']}",
            "",
            f"Medians of {results['steps']} steps; {describe(results['machine'])}",
            "",
            "| part | ms | share |",
            "|---|---|---|",
            *rows,
            "",
            f"Input is what a step waits for its batch. Without it a step takes {results['over_bare']:.2f} times "
            f"as long as the bare model's own forward and backward pass to its input ({results['bare']:.1f} ms).",
            "",
            "```",
            results["operators"].strip(),
            "```",
            "",
        ]
    )


if __name__ == "__main__":
    typer.run(main)
