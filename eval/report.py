"""The Markdown table of a protocol's results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from settings import Bar, Protocol

from loco_diffusion.errors import UserError
from loco_diffusion.files import write_text
from loco_diffusion.scoring import SCORES, Score

REFERENCE = "no-control"
SIMILARITY = ("ssim", "psnr")
FIELDS = (
    ("run_info", "experiment_name"),
    ("run_info", "method"),
    ("run_info", "settings"),
    ("run_info", "seconds"),
    ("train_info", "adapters"),
    ("train_info", "metrics"),
    ("meta_info", "model_info"),
    ("meta_info", "system_info"),
)
"""What the table reads of a result."""
Result = dict[str, Any]


def write_table(folder: Path, protocol: Protocol) -> Path:
    """Write README.md from all results in a folder; trials and results of other settings are only named.

    Returns:
        Its path.

    Raises:
        UserError: a result is damaged, or the folder is missing.
    """
    if not folder.is_dir():
        raise UserError(f"There are no results in {folder}; run an experiment first.")
    results = [_read(path) for path in sorted(folder.glob("*.json"))]
    return write_text(folder / "README.md", _render(results, protocol))


def _read(path: Path) -> Result:
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        for part, key in FIELDS:
            result[part][key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no result of this benchmark ({error!r}); run the experiment again."
        ) from error
    return result


def _render(results: Sequence[Result], protocol: Protocol) -> str:
    reference = next((r for r in results if _name(r) == REFERENCE and _fits(r, protocol)), None)
    base = reference["meta_info"]["model_info"] if reference else None
    shown = [r for r in results if _fits(r, protocol) and base in (None, r["meta_info"]["model_info"])]
    others = [_name(r) for r in results if r not in shown]
    scores = [(task, score) for task in protocol.tasks for score in SCORES[task]]
    columns = [(task, score) for task, score in scores if score.key not in SIMILARITY]
    similar = [(task, score) for task, score in scores if score.key in SIMILARITY]
    rows = sorted(shown, key=lambda r: (_name(r) != REFERENCE, r["run_info"]["method"] == "none", _name(r)))
    parts = [
        f"# Results of the protocol `{protocol.name}`",
        "Written by `python eval/benchmark.py`; do not edit.",
        protocol.description.strip(),
        f"{protocol.steps} steps, guidance {protocol.guidance:g}, seed {protocol.seed}. Errors are on the "
        "scale 0..255; ↑ higher is better, ↓ lower is better.",
        "## Scores",
        _table(rows, columns, lambda r, task, score: number(_value(r, task, score.key))),
    ]
    if reference is not None:
        parts += ["## Ratio to no control", _table(rows, columns, _ratio_to(reference))]
    parts += _bars(rows, protocol)
    parts += [
        "## Similarity to the original picture",
        _table(rows, similar, lambda r, task, score: number(_value(r, task, score.key))),
        "## Runs",
        _runs(rows),
        f"Left out, because of fewer pictures, other settings or another base: {', '.join(others)}."
        if others
        else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _fits(result: Result, protocol: Protocol) -> bool:
    settings: bool = result["run_info"]["settings"] == protocol.settings()
    return settings


def _table(
    rows: Sequence[Result],
    columns: Sequence[tuple[str, Score]],
    cell: Callable[[Result, str, Score], str],
) -> str:
    arrows = [f"{task}: {score.title} {'↑' if score.higher_is_better else '↓'}" for task, score in columns]
    lines = [["method", "experiment", *arrows]]
    for row in rows:
        cells = [cell(row, task, score) for task, score in columns]
        lines.append([row["run_info"]["method"], _name(row), *cells])
    return markdown_table(lines)


def _ratio_to(reference: Result) -> Callable[[Result, str, Score], str]:
    def cell(row: Result, task: str, score: Score) -> str:
        value, base = _value(row, task, score.key), _value(reference, task, score.key)
        return "–" if value is None or not base else f"{value / base:.3g}"

    return cell


def _bars(rows: Sequence[Result], protocol: Protocol) -> list[str]:
    """Which methods reach the protocol's bars, and by how much they miss them."""
    references = {_name(row): row for row in rows}
    lines = [["method", "experiment", "task", "bar", "ratio", "result"]]
    for row in rows:
        if row["run_info"]["method"] == "none":
            continue
        for bar in protocol.bars:
            reference = references.get(bar.than)
            value = _value(row, bar.task, bar.score)
            base = _value(reference, bar.task, bar.score) if reference else None
            if value is None or not base:
                continue
            title = next(score.title for score in SCORES[bar.task] if score.key == bar.score)
            wanted = f"≥ {bar.at_least:.3g}" if bar.at_least is not None else f"≤ {bar.at_most:.3g}"
            ratio = value / base
            cells = [bar.task, f"{title} {wanted} × {bar.than}", f"{ratio:.3g}", verdict(bar, ratio)]
            lines.append([row["run_info"]["method"], _name(row), *cells])
    return ["## Bars", markdown_table(lines)] if len(lines) > 1 else []


def verdict(bar: Bar, value: float) -> str:
    """ "met", or how far a value is from its bar, in per cent of the bar."""
    if bar.at_least is not None and value < bar.at_least:
        return f"missed: {100 * (1 - value / bar.at_least):.0f} % too low"
    if bar.at_most is not None and value > bar.at_most:
        return f"missed: {100 * (value / bar.at_most - 1):.0f} % too high"
    return "met"


def _runs(rows: Sequence[Result]) -> str:
    lines = [["method", "experiment", "adapter parameters", "encoder parameters", "MB", "seconds", "machine"]]
    for row in rows:
        adapters = row["train_info"]["adapters"].values()
        counts = [_range(adapters, key) for key in ("num_adapter_params", "num_encoder_params")]
        size = max((adapter["file_size"] for adapter in adapters), default=0) / 1e6
        system = row["meta_info"]["system_info"]
        machine = f"{system['cpu']}, {system['cpu_count']} CPUs, {system['device']}"
        cells = [*counts, f"{size:.2f}" if size else "–", f"{row['run_info']['seconds']:.0f}", machine]
        lines.append([row["run_info"]["method"], _name(row), *cells])
    return "Parameters and size of one adapter (one a task).\n\n" + markdown_table(lines)


def _range(adapters: Any, key: str) -> str:
    counts = sorted({adapter[key] for adapter in adapters})
    return "–" if not counts else f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,}–{counts[-1]:,}"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *body = (f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def _name(result: Result) -> str:
    name: str = result["run_info"]["experiment_name"]
    return name


def _value(result: Result, task: str, key: str) -> float | None:
    value: float | None = result["train_info"]["metrics"].get(task, {}).get(key)
    return value


def number(value: float | None) -> str:
    """Three places after the point below 10, one below 1,000, none above; no exponent."""
    if value is None:
        return "–"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"
