"""A few numbers for each of many layers, at a glance: as lines of bars in the terminal, and as a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Spectra = Mapping[str, Sequence[float]]
"""By the layer's path: its values, not negative, from the largest to the smallest; at least one."""

_NUMBER = re.compile(r"\b\d+\b")  # a whole part of a path
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", ".:-=+*#@"
_COLUMNS = 4  # of panels


def grouped(paths: Sequence[str]) -> dict[str, list[str]]:
    """Layers that differ in their blocks' numbers only, in the blocks' order, under a name like blocks.*.to_q."""
    groups: dict[str, list[str]] = {}
    for path in sorted(paths, key=_natural):
        groups.setdefault(_NUMBER.sub("*", path), []).append(path)
    return {_common_name(members): members for members in groups.values()}


def table(
    spectra: Spectra,
    quantity: str,
    unit: str,
    errors: Mapping[str, float] | None = None,
    ascii_only: bool = False,
) -> Table:
    """One row a group, with a bar for the largest value of each of its layers; all bars have one scale.

    Args:
        spectra: the values.
        quantity: what they are, such as "angle".
        unit: printed behind them, such as "°"; numbers with a unit get one decimal, others three digits.
        errors: each layer's ‖R Rᵀ - I‖, for a column with the group's largest.
        ascii_only: for terminals without block characters.
    """
    bars = _PLAIN_BARS if ascii_only else _BARS
    top = max(values[0] for values in spectra.values())
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    made.add_column("layers", no_wrap=True)
    made.add_column(f"largest {quantity}, 0 to {_number(top, unit)}", style="cyan", no_wrap=True)
    for name in ("median", "max"):
        made.add_column(name, justify="right", min_width=6)
    if errors:
        made.add_column("R Rᵀ - I", justify="right", no_wrap=True)
    for heading, rows in _sections(spectra).items():
        if heading:
            made.add_row(Text(heading, style="bold"))
        for label, paths in rows.items():
            largest = [spectra[path][0] for path in paths]
            heights = [int(value / (top or 1.0) * len(bars)) for value in largest]
            line = "".join(bars[min(height, len(bars) - 1)] for height in heights)
            everything = [value for path in paths for value in spectra[path]]
            numbers = [_number(median(everything), unit), _number(max(largest), unit)]
            if errors:
                numbers.append(f"{max(errors[path] for path in paths):.1e}")
            made.add_row(Text(f"  {label}" if heading else label), line, *numbers)
    return made


def picture(spectra: Spectra, quantity: str, unit: str, title: str) -> Image.Image:
    """A panel for each group: its blocks from left to right, a dot for each value, a line at the median.

    Args:
        spectra, quantity, unit: as for :func:`table`.
        title: written at the top.

    Returns:
        An RGB picture, 1200 px wide.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sections = _sections(spectra)
    rows = {heading: math.ceil(len(section) / _COLUMNS) for heading, section in sections.items()}
    figure = Figure(figsize=(8, 0.7 + 1.6 * sum(rows.values())), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(
        f"{title}\na column for each block; dots: the {quantity}s of its layer; line: their median",
        fontsize=9,
    )
    top = max(values[0] for values in spectra.values()) or 1.0
    parts = figure.subfigures(len(sections), 1, height_ratios=list(rows.values()), squeeze=False)[:, 0]
    for part, (heading, section) in zip(parts, sections.items(), strict=True):
        part.suptitle(heading, x=0.01, ha="left", fontsize=9, fontweight="bold")
        panels = part.subplots(rows[heading], _COLUMNS, sharey=True, squeeze=False).flatten()
        for panel, (label, paths) in zip(panels, section.items(), strict=False):
            _draw_panel(panel, label, [spectra[path] for path in paths], unit, 1.05 * top)
        for panel in panels[len(section) :]:
            panel.set_visible(False)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_panel(panel: Axes, label: str, layers: list[Sequence[float]], unit: str, top: float) -> None:
    for block, values in enumerate(layers):
        panel.plot(
            [block] * len(values),
            values,
            "o",
            color="tab:blue",
            alpha=0.4,
            markersize=3 if len(layers) < 16 else 1.5,
        )
        panel.hlines(median(values), block - 0.35, block + 0.35, color="tab:orange")
    panel.set_title(label, fontsize=8)
    panel.set_ylim(-0.05 * top, top)  # a median at 0 is to be seen
    panel.set_xlim(-0.6, len(layers) - 0.4)
    panel.set_xticks(sorted({0, len(layers) - 1}))
    panel.yaxis.set_major_formatter(f"{{x:.3g}}{unit}")
    panel.grid(axis="y", alpha=0.3)
    panel.tick_params(labelsize=7)


def _sections(spectra: Spectra) -> dict[str, dict[str, list[str]]]:
    """The groups' layers by the list of blocks that they are in ("" for none) and the rest of their name."""
    sections: dict[str, dict[str, list[str]]] = {}
    for name, paths in grouped(list(spectra)).items():
        heading, star, label = name.partition(".*.")
        heading, label = (heading, label) if star else ("", name)
        sections.setdefault(heading, {})[label] = paths
    return sections


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts numbers in paths as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _common_name(paths: Sequence[str]) -> str:
    """The paths' name, with a star for each number in which they differ."""
    columns = zip(*(_NUMBER.findall(path) for path in paths), strict=True)
    shown = iter([numbers[0] if len(set(numbers)) == 1 else "*" for numbers in columns])
    return _NUMBER.sub(lambda _: next(shown), paths[0])


def _number(value: float, unit: str) -> str:
    return f"{value:.1f}{unit}" if unit else f"{value:.3g}"
