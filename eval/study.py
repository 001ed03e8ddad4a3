"""Compare adapter methods: train each on the same batches, tune its learning rate, repeat over tasks and seeds.

    python eval/study.py --study methods
    python eval/study.py --study methods --method "loco both" --method lora
    python eval/study.py --study methods --table

Every run's result is a file of its own in eval/results/<study>; runs that have one are not repeated, so a study may
be spread over many sittings; results of other settings or another base are refused. The trainings themselves resume,
too. At the end the table and figure are drawn anew.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmark import check_writable
from rich.progress import Progress
from settings import FOLDER, Settings, Study, names, read
from study_report import best_rate, write_study
from torch import nn

from loco_diffusion.conditions import get_condition
from loco_diffusion.console import progress_bars, quiet_libraries, run_app, say
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import TEST_SEEDS, VALIDATION_SEEDS, sample_scene
from loco_diffusion.errors import NotFiniteError, UserError
from loco_diffusion.files import write_text
from loco_diffusion.generation import Sampling, Session, open_session
from loco_diffusion.images import to_pil
from loco_diffusion.machine import describe_machine
from loco_diffusion.scoring import TaskScores
from loco_diffusion.training.cache import model_identity
from loco_diffusion.training.checkpoints import list_checkpoints
from loco_diffusion.training.config import TrainingConfig, make_config
from loco_diffusion.training.journal import read_log
from loco_diffusion.training.report import training_seconds
from loco_diffusion.training.trainer import train

PACKAGES = ("torch", "diffusers", "peft")
_DRAWN_AT_ONCE = 16

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Run(Settings):
    """One training."""

    task: str
    method: str
    lr: float
    seed: int

    @property
    def file_name(self) -> str:
        method = self.method.replace(",", "").replace(" ", "-")
        return f"{self.task}--{method}--lr{self.lr:g}--seed{self.seed}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study with the given arguments, by default the process's; returns the exit status."""
    return run_app(app, "study.py", arguments)


@app.command()
def study(
    name: Annotated[
        str, typer.Option("--study", help=f"{', '.join(names('studies'))}, or the path of a YAML file.")
    ] = "methods",
    task: Annotated[
        list[str] | None, typer.Option(help="Only these tasks; rates are tuned on the study's first.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Only draw the results anew.")] = False,
    runs: Annotated[Path, typer.Option(help="Folder of the trainings.")] = Path("runs/study"),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = FOLDER / "results",
) -> None:
    """Train and score all that a study compares and that has no result yet."""
    chosen = read(Study, "studies", name)
    folder = out / chosen.name
    tasks = _known(task, chosen.tasks, "task")
    methods = _known(method, list(chosen.methods), "method")
    quiet_libraries()
    check_writable(folder)
    base = _base_identity(chosen.base)
    _check_results(chosen, base, folder)
    try:
        if not table:
            for run in _runs(chosen, tasks, methods, folder):
                say(f"Wrote {_take(chosen, run, base, runs / chosen.name, folder)}")
    finally:
        say(f"Wrote {write_study(folder, chosen)}")


def _known(wanted: list[str] | None, known: list[str], what: str) -> list[str]:
    for one in wanted or ():
        if one not in known:
            raise UserError(f"The study has no {what} {one!r}; choose from {', '.join(known)}.")
    return wanted or known


def _base_identity(base: str) -> dict[str, str]:
    """What stands for the weights that pictures of a base depend on."""
    pipe = open_session(base).pipe
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: model_identity(part) for name, part in models.items()}


def _settings(study: Study, run: Run, base: dict[str, str]) -> dict[str, Any]:
    """All that a run's scores depend on, as JSON types."""
    training = training_config(study, run, Path("run")).model_dump(
        mode="json", exclude={"output", "cache_folder"}
    )
    scoring = study.model_dump(include={"validation_pictures", "test_pictures", "sampling_steps"})
    return {**training, **scoring, "base": base}


def _check_results(study: Study, base: dict[str, str], folder: Path) -> None:
    """Raise UserError if a result of the study's methods is of other settings than the study now has."""
    for path in sorted(folder.glob("*--*.json")):
        try:
            result = json.loads(path.read_text())
            run, found = Run.model_validate(result["run"]), dict(result["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of this study ({error!r}); delete it.") from error
        if run.method in study.methods:
            wanted = _settings(study, run, base)
            changed = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
            if changed:
                raise UserError(
                    f"{path} was made with another {' and '.join(changed)} than the study now has; delete the "
                    "results that are outdated, or choose another --out."
                )


def _runs(study: Study, tasks: list[str], methods: list[str], folder: Path) -> Iterator[Run]:
    """The runs without a result: each method's rates on the first task, then its best rate with all tasks and seeds."""
    for method in methods:
        tuning = [
            Run(task=study.tasks[0], method=method, lr=lr, seed=study.seeds[0]) for lr in study.rates(method)
        ]
        yield from (run for run in tuning if not (folder / run.file_name).exists())
        lr = best_rate(study, folder, method)
        if lr is None:
            continue
        for task, seed in product(tasks, study.seeds):
            run = Run(task=task, method=method, lr=lr, seed=seed)
            if task in (study.methods[method].tasks or study.tasks) and not (folder / run.file_name).exists():
                yield run


def training_config(study: Study, run: Run, output: Path) -> TrainingConfig:
    """The configuration of a run's training."""
    method = study.methods[run.method]
    fields: dict[str, Any] = {
        "condition": run.task,
        "output": str(output),
        "base": study.base,
        "data": {"source": "scenes", "count": study.scenes, "size": study.size},
        "encoder": {"input": "latents"},
        "adapter": {
            "method": method.method,
            "target_modules": study.target_modules,
            "options": method.options,
            "fit_after": method.fit_after,
        },
        "steps": study.train_steps,
        "batch_size": study.batch_size,
        "lr": run.lr,
        "encoder_lr": study.encoder_lr,
        "warmup_steps": max(1, study.train_steps // 20),
        "decay": 0.3,
        "mixed_precision": "bf16",
        "seed": run.seed,
        "cache_folder": str(output.parent / "cache"),  # of all runs; encoding takes longer than a short run
        "validation": {"pictures": 0},  # scored below
    }
    if method.tokens:
        fields["tokens"] = {}
    return make_config(fields, f"{study.name}: {run.method}")


def _take(study: Study, run: Run, base: dict[str, str], runs: Path, folder: Path) -> Path:
    """Train, score and write the result of one run; its checkpoints are then no longer needed."""
    output = runs / Path(run.file_name).stem
    if not list_checkpoints(output / "checkpoints"):
        shutil.rmtree(output, ignore_errors=True)  # of a run whose result was deleted
    config = training_config(study, run, output)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {
        "run": run.model_dump(),
        "settings": _settings(study, run, base),
        "diverged": "",
        "machine": describe_machine(device, PACKAGES),
    }
    try:
        adapter = train(config, resume="latest")
        result |= _scored(study, run.task, adapter)
    except NotFiniteError as error:
        result["diverged"] = str(error)
    result["seconds"] = round(training_seconds(config, read_log(output / "log.jsonl")), 1)
    path = write_text(folder / run.file_name, json.dumps(result, indent=1) + "\n")
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
    return path


def _scored(study: Study, task: str, adapter: Path) -> dict[str, Any]:
    """Scores and sizes of a trained adapter."""
    session = open_session(study.base)
    session.load_adapters({task: adapter})
    groups = session.controller.trainable_parameters(task)
    with progress_bars() as progress:
        return {
            "validation": _scores(
                study, task, session, VALIDATION_SEEDS[: study.validation_pictures], progress
            ),
            "test": _scores(study, task, session, TEST_SEEDS[: study.test_pictures], progress),
            "parameters": {name: sum(p.numel() for p in group) for name, group in groups.items()},
        }


def _scores(study: Study, task: str, session: Session, seeds: range, progress: Progress) -> dict[str, float]:
    scores = TaskScores(task)
    sampling = Sampling(study.size, study.size, study.sampling_steps, 1.0)
    bar = progress.add_task(f"Pictures: {task}", total=len(seeds))
    for start in range(0, len(seeds), _DRAWN_AT_ONCE):
        part = seeds[start : start + _DRAWN_AT_ONCE]
        scenes = [sample_scene(seed) for seed in part]
        originals = [to_pil(picture) for picture in render(scenes, study.size).image]
        maps = {task: [get_condition(task).extract(picture) for picture in originals]}
        drawn = session.generate([scene.caption for scene in scenes], list(part), sampling, maps=maps)
        scores.update(drawn, originals)
        progress.update(bar, advance=len(part))
    return scores.compute()


if __name__ == "__main__":
    sys.exit(main())
