"""Where the time of a training step goes, and what it costs beside the bare model.

    python benchmarks/training_step.py embedded-canny
    python benchmarks/training_step.py flux1-dev-canny --layers 1 --steps 10

With --layers the base is a FLUX.1 of random weights, of its width but with so many double blocks and twice as many
single ones; it trains on scenes of the configuration's size, on the encoder route, by AdamW without accumulation or
checkpointing.

Runs the trainer itself under torch.profiler, which sums up the marks that it sets, and measures, under it as well, the
frozen model's own forward and backward pass to its input, of a batch of the same data: the least that any adapter
needs. Validation is off. Writes training_step-CONDITION-DEVICE.json and .md with shares and the costliest operators.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxTransformer2DModel
from output import RESULTS, describe, write
from rich.progress import Progress
from timing import milliseconds
from torch.profiler import ProfilerActivity, profile

from loco_diffusion.attention_backend import quickest_attention
from loco_diffusion.bases import load_base
from loco_diffusion.console import quiet_libraries
from loco_diffusion.control import family_of
from loco_diffusion.embedded import load_packaged_pipeline
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
    layers: Annotated[int, typer.Option(help="Double blocks of a random FLUX.1 instead of the base.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measure, and write the results."""
    quiet_libraries()
    chosen = load_config(find_config(Path(config)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"{chosen.condition}-{device}"
    with tempfile.TemporaryDirectory() as folder:
        if layers:
            make_flux(layers, Path(folder))
            chosen = on_flux(chosen, folder)
            name = f"flux-{name}"
        results = measure(chosen, steps)
    if layers:
        results["config"]["base"] = f"FLUX.1 with {layers} + {2 * layers} blocks"
    out.mkdir(parents=True, exist_ok=True)
    write(results, out / f"training_step-{name}.json", to_markdown)


def make_flux(layers: int, folder: Path) -> None:
    """Save the packaged pipeline with a random transformer of FLUX.1's width in place of its own."""
    pipe = load_packaged_pipeline(torch.bfloat16)
    own = pipe.transformer.config
    with torch.device(torch.accelerator.current_accelerator(check_available=True) or "cpu"):
        wide = FluxTransformer2DModel(
            in_channels=own.in_channels,
            num_layers=layers,
            num_single_layers=2 * layers,
            joint_attention_dim=own.joint_attention_dim,
            pooled_projection_dim=own.pooled_projection_dim,
        )
    pipe.register_modules(transformer=wide.to(torch.bfloat16))
    pipe.save_pretrained(folder)


def on_flux(config: TrainingConfig, folder: str) -> TrainingConfig:
    """The configuration on that base."""
    changes = {
        "base": folder,
        "dtype": "bfloat16",
        "data": {"source": "scenes", "count": 8, "size": config.data.size},
        "tokens": None,
        "optimizer": "adamw",
        "accumulation": 1,
        "gradient_checkpointing": False,
    }
    return make_config(config.model_dump(mode="json") | changes)


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
    autocast = config.mixed_precision != "no"
    tokens = batch.latents[0, 0].numel()

    def once() -> None:
        with (
            torch.autocast(device.type, config.compute_dtype, enabled=autocast),
            quickest_attention(device.type, config.compute_dtype, tokens),
        ):
            loss = objective.loss(batch)
        loss.backward()

    with profile(activities=[ProfilerActivity.CPU]):  # slows it down as it did the trainer
        times = [milliseconds(once, device.type) for _ in range(WARM_UPS + repeats)]
    return median(times[WARM_UPS:])


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
