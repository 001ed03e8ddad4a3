"""What a study found: the tuned learning rates, a table, a figure."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from report import markdown_table
from settings import Study

from loco_diffusion.files import write_text
from loco_diffusion.scoring import SCORES, Score

Result = dict[str, Any]


def read_results(folder: Path, task: str) -> list[Result]:
    """All results of a task, in the order of their files' names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{task}--*.json"))]


def best_rate(study: Study, folder: Path, method: str) -> float | None:
    """The rate whose first run scores best on the first task's validation pictures; None if all diverged."""
    task, rates = study.tasks[0], study.rates(method)
    score = SCORES[task][0]
    rated = {
        result["run"]["lr"]: result["validation"][score.key]
        for result in read_results(folder, task)
        if result["run"]["method"] == method
        and result["run"]["seed"] == study.seeds[0]
        and result["run"]["lr"] in rates
        and "validation" in result
    }
    choose = max if score.higher_is_better else min
    return choose(rated, key=lambda lr: rated[lr]) if rated else None


def write_study(folder: Path, study: Study) -> Path:
    """Write README.md and a figure for each task from all results in a folder; returns the former's path."""
    parts = [
        f"# The study `{study.name}`",
        "Written by `python eval/study.py`; do not edit.",
        study.description.strip(),
        f"{study.train_steps} steps of {study.batch_size}, {study.scenes:,} scenes at {study.size} px, "
        f"layers: {study.target_modules}; pictures in {study.sampling_steps} steps without guidance. "
        "± is the standard deviation over the seeds; differences are taken seed by seed.",
    ]
    for task in study.tasks:
        by_method = best_runs(study, folder, task)
        if by_method:
            figure = _draw(folder / f"{task}.png", task, by_method, study.reference)
            parts += [f"## {task}", _table(study, task, by_method), *_remarks(study, folder, task, by_method)]
            parts.append(f"![{task}: all methods]({figure.name})")
    return write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def best_runs(study: Study, folder: Path, task: str) -> dict[str, list[Result]]:
    """The runs with each method's best learning rate that did not diverge; methods without any are left out."""
    results, chosen = read_results(folder, task), {}
    for method in study.methods:
        lr = best_rate(study, folder, method)
        own = [r for r in results if r["run"]["method"] == method and r["run"]["lr"] == lr and "test" in r]
        if own:
            chosen[method] = own
    return chosen


def _table(study: Study, task: str, by_method: dict[str, list[Result]]) -> str:
    shown = [score for score in SCORES[task] if score.key not in ("ssim", "psnr")]
    arrows = [f"{score.title} {'↑' if score.higher_is_better else '↓'}" for score in shown]
    beside = f"{shown[0].title} − that of {study.reference}"
    lines = [["method", *arrows, beside, "lr", "seeds", "adapter parameters", "fastest training, s"]]
    best_first = sorted(
        by_method, key=lambda m: mean(values_of(by_method[m], shown[0])), reverse=shown[0].higher_is_better
    )
    for method in best_first:
        runs = by_method[method]
        lr, rates = runs[0]["run"]["lr"], study.rates(method)
        at_an_end = len(rates) > 1 and lr in (min(rates), max(rates))
        lines.append(
            [
                method,
                *(spread(values_of(runs, score)) for score in shown),
                _from_reference(runs, by_method.get(study.reference, []), shown[0]),
                f"{lr:g}{' *' if at_an_end else ''}",
                str(len(runs)),
                f"{runs[0]['parameters']['adapter']:,}",
                f"{min(run['seconds'] for run in runs):.0f}",
            ]
        )
    return markdown_table(lines)


def _remarks(study: Study, folder: Path, task: str, by_method: dict[str, list[Result]]) -> list[str]:
    """What the table does not say: how well rates were tuned, what diverged, on which machines runs were trained."""
    results = [result for result in read_results(folder, task) if result["run"]["method"] in study.methods]
    diverged = [
        f"{result['run']['method']} (lr {result['run']['lr']:g}, seed {result['run']['seed']})"
        for result in results
        if result["diverged"]
    ]
    trained = {result["run"]["method"] for result in results}
    missing = [
        m for m, one in study.methods.items() if task in (one.tasks or study.tasks) and m not in trained
    ]
    machines = {
        f"{machine['cpu']}, {machine['threads']} threads, {machine['device']}"
        for result in results
        for machine in [result["machine"]]
    }
    return [
        "\\* the best of the rates that were tried, at an end of them: a better one may lie beyond. The seed that "
        "chose the rate is one of those in the mean.",
        f"Diverged, and not in the means: {'; '.join(diverged) or 'none'}. Not trained yet: "
        f"{'; '.join(missing) or 'none'}. Trained on: {'; '.join(sorted(machines))}.",
    ]


def values_of(runs: list[Result], score: Score) -> list[float]:
    """The runs' scores on the test scenes."""
    return [run["test"][score.key] for run in runs]


def _from_reference(runs: list[Result], reference: list[Result], score: Score) -> str:
    """How a score differs from the reference's, seed by seed: much of its spread is the seed's, not the method's."""
    own, other = ({run["run"]["seed"]: run["test"][score.key] for run in part} for part in (runs, reference))
    differences = [own[seed] - other[seed] for seed in own.keys() & other.keys()]
    return spread(differences, _digits(list(own.values())), "+") if any(differences) else "–"


def _digits(values: list[float]) -> int:
    return 3 if max(values) < 10 else 1


def spread(values: list[float], digits: int | None = None, sign: str = "") -> str:
    """Their mean and, of several, their standard deviation."""
    digits = _digits(values) if digits is None else digits
    deviation = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.{digits}f}{deviation}"


def _draw(path: Path, task: str, by_method: dict[str, list[Result]], reference: str) -> Path:
    """One row a method: its seeds as dots, their mean as a line; the reference's mean through all rows."""
    from matplotlib.figure import Figure

    score = SCORES[task][0]
    ordered = sorted(
        by_method, key=lambda m: mean(values_of(by_method[m], score)), reverse=not score.higher_is_better
    )
    figure = Figure(figsize=(7, 0.6 + 0.32 * len(ordered)), layout="constrained")
    axes = figure.add_subplot()
    for row, method in enumerate(ordered):
        values = values_of(by_method[method], score)
        color = "tab:orange" if "loco" in method else "tab:gray"
        axes.plot(values, [row] * len(values), "o", color=color, markersize=5, alpha=0.8)
        axes.plot([mean(values)] * 2, [row - 0.3, row + 0.3], color=color, linewidth=2)
    if reference in by_method:
        axes.axvline(
            mean(values_of(by_method[reference], score)), color="tab:blue", linewidth=0.8, linestyle=":"
        )
    axes.set_yticks(range(len(ordered)), ordered)
    axes.set_xlabel(f"{score.title} ({'higher' if score.higher_is_better else 'lower'} is better)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
