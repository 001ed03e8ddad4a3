"""What the trained adapters of a study do to the weights: how far they turn, and how large their changes are.

    python eval/study_profile.py --study methods --task canny

Reads the adapters that `eval/study.py` left in the folder of its trainings, each method's with its best learning rate
and the study's first seed, and adds profile-TASK.md and profile-TASK.png to the study's results.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from peft.tuners.tuners_utils import BaseTunerLayer
from report import markdown_table
from settings import FOLDER, Study, read
from study import Run
from study_report import Result, best_runs, spread, values_of
from torch import nn

from loco_diffusion.adapters.inspection import inspect
from loco_diffusion.console import quiet_libraries, run_app, say
from loco_diffusion.control import layers
from loco_diffusion.errors import UserError
from loco_diffusion.files import write_text
from loco_diffusion.generation import open_session
from loco_diffusion.scoring import SCORES

SHOWN = 32  # singular values of a change
# Degrees: a Cayley rotation turns by 2 atan(a / 2), whose slope has fallen to a quarter there.
SATURATED = 120.0

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass
class Profile:
    """An adapter's changes W' - W, layer by layer.

    Attributes:
        spectra: (layers, SHOWN), the largest singular values of the changes, each over its weight's largest one.
        norms: the changes' Frobenius norms over their weights'.
        ranks: effective ranks of the changes, exp of the entropy of their normalised squared singular values.
        angles: in degrees, of all planes; none for methods that do not rotate by planes.
    """

    spectra: torch.Tensor
    norms: list[float]
    ranks: list[float]
    angles: list[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the given arguments, by default the process's; returns the exit status."""
    return run_app(app, "study_profile.py", arguments)


@app.command()
def profile(
    name: Annotated[
        str, typer.Option("--study", help="A study's name, or the path of its file.")
    ] = "methods",
    task: Annotated[str, typer.Option(help="One of the study's tasks.")] = "canny",
    runs: Annotated[Path, typer.Option(help="Folder of the trainings.")] = Path("runs/study"),
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = FOLDER / "results",
) -> None:
    """Compare what a study's adapters do to the weights."""
    study = read(Study, "studies", name)
    folder = out / study.name
    quiet_libraries()
    by_method = best_runs(study, folder, task)
    profiles = dict(_profiles(study, by_method, runs / study.name))
    if not profiles:
        raise UserError(f"{runs / study.name} holds no trained adapters of {task}; run eval/study.py first.")
    _draw(folder / f"profile-{task}.png", profiles)
    say(f"Wrote {write_text(folder / f'profile-{task}.md', _render(study, task, profiles, by_method))}")


def _profiles(study: Study, by_method: dict[str, list[Result]], runs: Path) -> Iterator[tuple[str, Profile]]:
    for method, results in by_method.items():
        if study.methods[method].tokens:
            continue  # its adapter acts on the condition alone
        first = Run(**results[0]["run"] | {"seed": study.seeds[0]})
        adapter = runs / Path(first.file_name).stem / "adapter"
        if adapter.is_dir():
            yield method, measure(study.base, first.task, adapter)


def measure(base: str, task: str, adapter: Path) -> Profile:
    """The profile of one adapter, which is merged into a base of its own for it."""
    session = open_session(base)
    session.load_adapters({task: adapter})
    denoiser = session.controller.family.denoiser(session.pipe)
    found = inspect(layers.config_of(denoiser, task), dict(layers.weights_of(denoiser, task)))
    turns = found is not None and found.unit != ""
    angles = [value for values in found.spectra.values() for value in values] if found and turns else []
    spectra, norms, ranks = [], [], []
    for weight, change in _changes(denoiser, task):
        values = torch.linalg.svdvals(change.double())
        energy = values.square() / values.square().sum().clamp(min=1e-30)
        spectra.append(nn.functional.pad(values, (0, SHOWN))[:SHOWN] / torch.linalg.matrix_norm(weight, 2))
        norms.append(float(change.norm() / weight.norm()))
        ranks.append(float(torch.special.entr(energy).sum().exp()))
    return Profile(torch.stack(spectra), norms, ranks, angles)


def _changes(denoiser: nn.Module, name: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """W and W' - W of each layer, (out, in); works for every method whose layers can merge."""
    for layer in denoiser.modules():
        if isinstance(layer, BaseTunerLayer) and name in layer._all_available_adapter_names():
            weight = layer.get_base_layer().weight
            assert isinstance(weight, torch.Tensor)
            before = weight.detach().clone()
            layer.merge(adapter_names=[name])
            yield before.flatten(1), (weight.detach() - before).flatten(1)


def _render(study: Study, task: str, profiles: dict[str, Profile], by_method: dict[str, list[Result]]) -> str:
    score = SCORES[task][0]
    arrow = "↑" if score.higher_is_better else "↓"
    head = f"{score.title} {arrow}", "change / weight", "largest σ / σ₁", "effective rank", "median angle"
    lines = [["method", *head, "angles above 120°"]]
    for method, own in profiles.items():
        turned = sum(angle > SATURATED for angle in own.angles) / max(1, len(own.angles))
        lines.append(
            [
                method,
                spread(values_of(by_method[method], score)),
                f"{median(own.norms):.3f}",
                f"{own.spectra[:, 0].median():.3f}",
                f"{median(own.ranks):.1f}",
                f"{median(own.angles):.0f}°" if own.angles else "–",
                f"{100 * turned:.0f} %" if own.angles else "–",
            ]
        )
    parts = [
        f"# What the adapters of `{study.name}` do to the weights: {task}",
        "Written by `python eval/study_profile.py`; do not edit.",
        "Medians over the layers, of the first seed's adapters: the change W' - W by its Frobenius norm and by its "
        "largest singular value, each over the weight's own, and its effective rank; the angles of the rotations.",
        markdown_table(lines),
        f"![Singular values of the changes, and angles](profile-{task}.png)",
    ]
    return "\n\n".join(parts) + "\n"


def _draw(path: Path, profiles: dict[str, Profile]) -> None:
    """Left the median spectrum of the changes, right how the angles are distributed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5), layout="constrained")
    changes, angles = figure.subplots(1, 2)
    for number, (method, own) in enumerate(profiles.items()):
        color = f"C{number % 10}"
        style = dict(color=color, linestyle="-" if number < 10 else "--", linewidth=1.4, label=method)
        changes.plot(range(1, SHOWN + 1), own.spectra.median(0).values.clamp(min=1e-9), **style)
        if own.angles:
            shares = [100 * (index + 1) / len(own.angles) for index in range(len(own.angles))]
            angles.plot(sorted(own.angles), shares, **style)
    changes.set_yscale("log")
    changes.set_ylim(bottom=0.01)  # beyond an adapter's rank there is nothing
    changes.set_xlabel("number of the singular value")
    changes.set_ylabel("σ of W' - W over σ₁ of W, median of the layers")
    angles.set_xlabel("angle of a plane, degrees")
    angles.set_ylabel("planes up to this angle, %")
    for axes in (changes, angles):
        axes.grid(alpha=0.3)
    figure.legend(*changes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
