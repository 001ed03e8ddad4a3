"""Score methods of control by one protocol, and keep the results.

    python eval/benchmark.py --protocol scenes --experiment all
    python eval/benchmark.py --protocol scenes --experiment loco --adapters runs/adapters
    python eval/benchmark.py --protocol scenes --table

Each experiment writes eval/results/<protocol>/<method>--<experiment>.json when it is done. At the end the
table of all results is written anew beside them.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from report import write_table
from rich.progress import Progress
from settings import FOLDER, Experiment, Protocol, names, read

from loco_diffusion.conditions import get_condition
from loco_diffusion.console import progress_bars, quiet_libraries, run_app, say
from loco_diffusion.control import adapter_folder
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import sample_scene
from loco_diffusion.embedded import packaged_adapter
from loco_diffusion.errors import UserError
from loco_diffusion.files import write_text
from loco_diffusion.generation import Sampling, Session, open_session
from loco_diffusion.images import to_pil
from loco_diffusion.machine import cpu_name, package_versions
from loco_diffusion.scoring import TaskScores

PACKAGES = ("torch", "diffusers", "transformers", "peft", "torchmetrics", "controlnet-aux", "pillow", "numpy")
Scores = dict[str, dict[str, float]]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark with the given arguments, by default the process's; returns the exit status."""
    return run_app(app, "benchmark.py", arguments)


@app.command()
def benchmark(
    protocol: Annotated[
        str, typer.Option(help=f"{', '.join(names('protocols'))}, or the path of a YAML file.")
    ] = "scenes",
    experiment: Annotated[
        str, typer.Option(help=f"{', '.join(names('experiments'))}, the path of a YAML file, or all.")
    ] = "all",
    adapters: Annotated[
        Path | None,
        typer.Option(help="Folder with one adapter folder a task, instead of the experiment's own."),
    ] = None,
    row: Annotated[
        str | None, typer.Option(help="Name of the row of --adapters; default: the name of their folder.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first pictures, for a trial; kept out of the table.")
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Only write the table of the results anew.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = FOLDER / "results",
) -> None:
    """Draw pictures by a protocol, score how well they follow their conditions, and keep the results."""
    chosen = read(Protocol, "protocols", protocol)
    folder = out / chosen.name
    if not table:
        wanted = names("experiments") if experiment == "all" else [experiment]
        experiments = [_with_adapters(read(Experiment, "experiments", one), adapters, row) for one in wanted]
        count = min(limit or chosen.pictures, chosen.pictures)
        quiet_libraries()
        check_writable(folder)
        with progress_bars() as progress:
            for one in experiments:
                say(f"Wrote {_run(one, chosen, count, folder, progress)}")
    say(f"Wrote {write_table(folder, chosen)}")


def _with_adapters(experiment: Experiment, adapters: Path | None, row: str | None) -> Experiment:
    """The experiment, with other adapters and another name if it has any adapters."""
    if experiment.pictures != "adapters" or adapters is None:
        return experiment
    name = row or adapters.resolve().name
    return experiment.model_copy(update={"name": name, "adapters": str(adapters)})


def _run(experiment: Experiment, protocol: Protocol, count: int, folder: Path, progress: Progress) -> Path:
    """Run one experiment on the first `count` pictures and write its result."""
    sources = _sources(experiment, protocol)
    session = open_session(protocol.base)
    environment = describe_environment(session)
    session.load_adapters(sources)
    started = time.monotonic()
    scores = evaluate(session, experiment, protocol, count, progress)
    methods = {info.method.lower() for info in session.controller.adapters.values()}
    method = "+".join(sorted(methods)) or "none"
    name = experiment.name if count == protocol.pictures else f"{experiment.name}-first-{count}"
    result = {
        "run_info": {
            "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "experiment_name": name,
            "method": method,
            "protocol": protocol.name,
            "settings": protocol.settings() | {"pictures": count},
            "seconds": round(time.monotonic() - started, 1),
        },
        "train_info": {
            "status": "success",
            "adapters": {task: _describe_adapter(source) for task, source in sources.items()},
            "metrics": scores,
        },
        "meta_info": environment,
    }
    return write_text(folder / f"{method}--{name}.json", json.dumps(result, indent=2) + "\n")


def _sources(experiment: Experiment, protocol: Protocol) -> dict[str, Path]:
    """The adapter folders of an experiment, by task."""
    if experiment.pictures != "adapters":
        return {}
    if experiment.adapters == "packaged":
        return {task: packaged_adapter(task, protocol.base) for task in protocol.tasks}
    folders = {task: Path(experiment.adapters).resolve() / task for task in protocol.tasks}
    for task, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"{experiment.adapters} has no adapter folder {task}; train one into it.")
    return folders


def evaluate(
    session: Session, experiment: Experiment, protocol: Protocol, count: int, progress: Progress
) -> Scores:
    """Draw and score the first `count` pictures of a protocol.

    Each picture is drawn once; where it does not depend on the task, it is scored for all of them.

    Returns:
        By task, then by score.
    """
    groups = [[task] for task in protocol.tasks] if experiment.pictures == "adapters" else [protocol.tasks]
    sampling = Sampling(protocol.size, protocol.size, protocol.steps, protocol.guidance)
    scores = {task: TaskScores(task) for task in protocol.tasks}
    bar = progress.add_task(f"Pictures: {experiment.pictures}", total=len(groups) * count)
    for start in range(0, count, protocol.batch_size):
        numbers = range(start, min(start + protocol.batch_size, count))
        scenes = [sample_scene(protocol.first_seed + number) for number in numbers]
        originals = [to_pil(picture) for picture in render(scenes, protocol.size).image]
        captions = [scene.caption for scene in scenes]
        seeds = [protocol.seed + number for number in numbers]
        for tasks in groups:
            if experiment.pictures == "vae":
                pictures = session.reconstruct(originals)
            else:
                maps = _maps(tasks, originals) if experiment.pictures == "adapters" else {}
                pictures = session.generate(captions, seeds, sampling, maps=maps)
            for task in tasks:
                scores[task].update(pictures, originals)
            progress.update(bar, advance=len(numbers))
    return {task: scores[task].compute() for task in protocol.tasks}


def _maps(tasks: Iterable[str], originals: list[Image.Image]) -> dict[str, list[Image.Image]]:
    return {task: [get_condition(task).extract(picture) for picture in originals] for task in tasks}


def _describe_adapter(folder: Path) -> dict[str, Any]:
    """Settings and sizes of an adapter, without the place where it lies."""
    content = adapter_folder.read(folder)
    settings = json.loads(json.dumps(content.method.to_dict(), default=str))
    return {
        "peft_config": {key: value for key, value in settings.items() if value not in (None, {}, [])},
        "encoder": asdict(content.control.encoder) if content.control.encoder else None,
        "num_adapter_params": sum(tensor.numel() for tensor in content.adapter.values()),
        "num_encoder_params": sum(tensor.numel() for tensor in content.encoder.values()),
        "file_size": sum(
            file.stat().st_size for file in map(folder.joinpath, adapter_folder.FILES) if file.exists()
        ),
    }


def describe_environment(session: Session) -> dict[str, Any]:
    """What a result depends on: the base's weights, the packages, the machine."""
    denoiser = session.controller.family.denoiser(session.pipe)
    digest = hashlib.sha256()
    for _, weights in sorted(denoiser.state_dict().items()):
        digest.update(weights.cpu().contiguous().view(torch.uint8).numpy())
    return {
        "model_info": {"denoiser": type(denoiser).__name__, "sha256": digest.hexdigest()},
        "package_info": package_versions(PACKAGES),
        "system_info": {
            "python": platform.python_version(),
            "cpu_count": os.cpu_count(),
            "cpu": cpu_name(),
            "device": str(session.pipe.device),
        },
    }


def check_writable(folder: Path) -> None:
    """Make the folder of the results; UserError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); choose another --out.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} is not writable; choose another --out.")


if __name__ == "__main__":
    sys.exit(main())
