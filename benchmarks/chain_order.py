"""What the order of a chain of rotations costs and what it is worth.

    python benchmarks/chain_order.py
    python benchmarks/chain_order.py --device cuda

LoCO's chain R_1 R_2 ... R_m can be cut off after the products of p + 1 rotations (`chain_order=p`); p = m - 1
is exact. For chains of several lengths, whose rotations all turn r planes by one angle, this measures

- the error, the spectral norm of R - R^(p), beside its bound (`rotations.chain_error_bound`),
- the orthogonality error, the Frobenius norm of R^(p) R^(p)^T - I,
- the time to form the chain and to rotate tokens by it, there and back.

Error and bound depend on the angles between the planes of different rotations. Two extremes are shown: planes
drawn at random, which hardly meet in many dimensions, and planes that all coincide, where the error is as
large as it can be. Everything but the time is computed in float64. Writes chain_order.json and chain_order.png.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial, reduce
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from output import RESULTS
from timing import in_turn
from torch import Tensor

from loco_diffusion import rotations
from loco_diffusion.machine import describe_machine

LENGTHS = (2, 4, 8)
TIMED_LENGTHS = (1, 2, 4, 8, 16)
DEGREES = tuple(90 * 2 ** (-step / 2) for step in range(14))
MAX_ORDER = 3  # and the exact one
PLANES = ("random", "coinciding")
WAYS = ("order 0", "order 1", "exact")
SEQUENTIAL = "one by one"

_COLORS = {
    "order 0": "tab:red",
    "order 1": "tab:orange",
    "order 2": "tab:green",
    "order 3": "tab:blue",
    "exact": "black",
    SEQUENTIAL: "tab:purple",
}

Records = list[dict[str, Any]]


def main(
    size: Annotated[int, typer.Option(help="Dimensions, a layer's inputs.")] = 3072,
    r: Annotated[int, typer.Option(help="Planes a rotation turns in.")] = 4,
    tokens: Annotated[int, typer.Option(help="Rows that the timed rotations turn.")] = 1024,
    repeats: Annotated[int, typer.Option(help="Timed runs of each way; the median counts.")] = 30,
    device: Annotated[str, typer.Option(help="Where to measure the time: cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
) -> None:
    """Measure the chain orders and write the numbers and the figure."""
    results = {
        "settings": {"size": size, "r": r, "tokens": tokens, "repeats": repeats, "device": device},
        "machine": describe_machine(device, ["torch"]),
        "accuracy": accuracy(size, r),
        "time": timing(size, r, tokens, repeats, device),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "chain_order.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results).savefig(out / "chain_order.png")
    typer.echo(f"Wrote {out / 'chain_order.json'} and {out / 'chain_order.png'}.")


def accuracy(size: int, r: int) -> Records:
    """Error, bound and orthogonality error for each kind of planes, length, angle and order."""
    records: Records = []
    for planes in PLANES:
        for length in LENGTHS:
            u, v = _factors(planes, length, size, r)
            for degrees in DEGREES:
                scale = 2 * math.tan(math.radians(degrees) / 2)  # the Cayley map turns by 2 atan(scale / 2)
                delta = rotations.max_distance_from_identity(u, v, scale)
                exact = _product(u, v, scale)
                for order in [*range(min(MAX_ORDER + 1, length - 1)), length - 1]:
                    basis, core = rotations.chain(u, v, scale, order=order)
                    error = torch.linalg.matrix_norm(exact - rotations.dense(basis, core), 2).item()
                    records.append(
                        {
                            "planes": planes,
                            "num_rotations": length,
                            "degrees": degrees,
                            "order": "exact" if order == length - 1 else order,
                            "error": error,
                            "bound": rotations.chain_error_bound(delta, length, order),
                            "orthogonality_error": rotations.orthogonality_error(basis, core),
                        }
                    )
    return records


def _factors(planes: str, length: int, size: int, r: int) -> tuple[Tensor, Tensor]:
    """u, v: (m, k, r) of rotations in r orthogonal planes each, in coordinates of their k-dimensional span.

    What lies outside of the span never turns, so that no error is lost with it.
    """
    generator = torch.Generator().manual_seed(0)
    count = length if planes == "random" else 1
    drawn = torch.linalg.qr(torch.randn(count, size, 2 * r, generator=generator, dtype=torch.float64)).Q
    span = torch.linalg.qr(drawn.transpose(0, 1).flatten(1)).Q
    u, v = (span.mT @ drawn).expand(length, -1, -1).split(r, dim=-1)
    return u, v


def _product(u: Tensor, v: Tensor, scale: float) -> Tensor:
    """R_1 R_2 ... R_m as matrices, one after the other."""
    return reduce(
        torch.matmul,
        (rotations.dense(*rotations.chain(u[k : k + 1], v[k : k + 1], scale)) for k in range(len(u))),
    )


def timing(size: int, r: int, tokens: int, repeats: int, device: str) -> Records:
    """Milliseconds to form each chain and to rotate tokens by it, with gradients and without."""
    records: Records = []
    for length in TIMED_LENGTHS:
        u, v = ((0.1 * torch.randn(length, size, r, device=device)).requires_grad_() for _ in "uv")
        x = torch.randn(tokens, size, device=device, requires_grad=True)
        runs: dict[tuple[str, str], Callable[[], object]] = {}
        for way in WAYS:
            order = length - 1 if way == "exact" else min(int(way[-1]), length - 1)
            runs["form", way] = partial(_with_gradients, _form, u, v, order)
            runs["train", way] = partial(_with_gradients, _rotate, u, v, order, x)
            runs["evaluate", way] = partial(_without_gradients, _rotate, u, v, order, x)
        runs["train", SEQUENTIAL] = partial(_with_gradients, _rotate_one_by_one, u, v, x)
        runs["evaluate", SEQUENTIAL] = partial(_without_gradients, _rotate_one_by_one, u, v, x)
        records += [
            {"what": what, "way": way, "num_rotations": length, "milliseconds": median(times)}
            for (what, way), times in in_turn(runs, repeats, device).items()
        ]
    return records


def _form(u: Tensor, v: Tensor, order: int) -> Tensor:
    basis, core = rotations.chain(u, v, 1.0, order=order)
    return basis.sum() + core.sum()


def _rotate(u: Tensor, v: Tensor, order: int, x: Tensor) -> Tensor:
    return rotations.apply(x, *rotations.chain(u, v, 1.0, order=order)).sum()


def _rotate_one_by_one(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    for k in reversed(range(len(u))):
        x = rotations.apply(x, *rotations.chain(u[k : k + 1], v[k : k + 1], 1.0))
    return x.sum()


def _with_gradients(run: Callable[..., Tensor], *arguments: object) -> None:
    run(*arguments).backward()


def _without_gradients(run: Callable[..., Tensor], *arguments: object) -> None:
    with torch.no_grad():
        run(*arguments)


def draw(results: dict[str, Any]) -> Figure:
    """The figure: errors by angle for each length, orthogonality errors likewise, time by length."""
    settings, machine = results["settings"], results["machine"]
    figure = Figure(figsize=(11, 11), dpi=150, layout="constrained")
    figure.suptitle(
        "What the order of a chain of rotations is worth, and what it costs\n"
        f"rotations in r = {settings['r']} planes of {settings['size']} dimensions (Cayley map); errors in "
        f"float64; time in float32, median of {settings['repeats']} runs\n{machine['device']}; {machine['cpu']}, "
        f"{machine['threads']} threads, load {machine['load']}; torch {machine['packages']['torch']}",
        fontsize=9,
    )
    panels = figure.subplots(3, 3)
    for column, length in enumerate(LENGTHS):
        chosen = [record for record in results["accuracy"] if record["num_rotations"] == length]
        panels[0, column].set_title(f"{length} rotations", fontsize=9)
        _draw_accuracy(panels[0, column], chosen, "error", "error, spectral norm")
        _draw_accuracy(
            panels[1, column], chosen, "orthogonality_error", "orthogonality error, Frobenius norm"
        )
    rotate = f"form it, rotate {settings['tokens']} tokens"
    titles = {
        "form": "form the chain: forward, backward",
        "train": f"{rotate}: forward, backward",
        "evaluate": f"{rotate}: forward",
    }
    for panel, (what, title) in zip(panels[2], titles.items(), strict=True):
        panel.set_title(title, fontsize=9)
        _draw_time(panel, [record for record in results["time"] if record["what"] == what])
    lines = [Line2D([], [], color=color, label=name) for name, color in _COLORS.items()]
    lines += [
        Line2D([], [], color="gray", label="planes drawn at random"),
        Line2D([], [], color="gray", linestyle="", marker=".", label="planes that coincide"),
        Line2D([], [], color="gray", linestyle="--", label="bound for any planes"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(_COLORS), fontsize=8)
    return figure


def _draw_accuracy(panel: Axes, records: Records, quantity: str, label: str) -> None:
    styles = [(PLANES[0], quantity, "-"), (PLANES[1], quantity, ".")]
    if quantity == "error":
        styles.insert(0, (PLANES[1], "bound", "--"))
    for order in dict.fromkeys(record["order"] for record in records):
        color = _COLORS["exact" if order == "exact" else f"order {order}"]
        for planes, key, style in styles:
            points = [r for r in records if (r["order"], r["planes"]) == (order, planes) and r[key] > 0]
            panel.loglog([r["degrees"] for r in points], [r[key] for r in points], style, color=color)
    panel.set_ylim(1e-17, 1e9)
    panel.set_xlabel("angle of each rotation, degrees", fontsize=8)
    panel.set_ylabel(label, fontsize=8)
    _finish(panel)


def _draw_time(panel: Axes, records: Records) -> None:
    for way in dict.fromkeys(record["way"] for record in records):
        points = [record for record in records if record["way"] == way]
        x, y = ([r[key] for r in points] for key in ("num_rotations", "milliseconds"))
        panel.loglog(x, y, color=_COLORS[way])
    panel.set_xticks(TIMED_LENGTHS, [str(length) for length in TIMED_LENGTHS], minor=False)
    panel.set_xticks([], minor=True)
    panel.set_xlabel("rotations in the chain", fontsize=8)
    panel.set_ylabel("ms", fontsize=8)
    _finish(panel)


def _finish(panel: Axes) -> None:
    panel.grid(alpha=0.3)
    panel.tick_params(labelsize=7)


if __name__ == "__main__":
    typer.run(main)
