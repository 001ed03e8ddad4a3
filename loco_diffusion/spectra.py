"""A few numbers for each of many layers, at a glance: as lines of bars in the terminal, and as a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from rich.text import Text

Spectra = Mapping[str, Sequence[float]]
"""By the layer's path: its values, not negative, from the largest to the smallest; at least one."""

_NUMBER = re.compile(r"\b\d+\b")  # a whole part of a path
_BARS, _PLAIN_BARS = "▁▂▃▄▅▆▇█", ".:-=+*#@"

_SCALE = 3  # drawn larger and reduced, which smooths the edges
_COLUMNS, _PANEL, _GAP, _LINE = 4, (230, 110), 28, 20
_AXIS = 62  # for the numbers at the left
_FONT, _SMALL_FONT = 13, 11
_LONGEST = 32  # letters over a panel
_PAPER, _INK, _SOFT_INK, _GRID = (255, 255, 255), (25, 25, 25), (115, 115, 115), (228, 228, 228)
_DOT, _MEDIAN = (37, 99, 175, 110), (214, 93, 14, 255)


def grouped(paths: Sequence[str]) -> dict[str, list[str]]:
    """Layers that differ in their blocks' numbers only, in the blocks' order, under a name like blocks.*.to_q."""
    groups: dict[str, list[str]] = {}
    for path in sorted(paths, key=_natural):
        groups.setdefault(_NUMBER.sub("*", path), []).append(path)
    return {_common_name(members): members for members in groups.values()}


def table(spectra: Spectra, quantity: str, unit: str, ascii_only: bool = False) -> Table:
    """One row a group, with a bar for the largest value of each of its layers; all bars have one scale.

    Args:
        spectra: the values.
        quantity: what they are, such as "angle".
        unit: printed behind them, such as "°"; numbers with a unit get one decimal, others three digits.
        ascii_only: for terminals without block characters.
    """
    bars = _PLAIN_BARS if ascii_only else _BARS
    top = max(values[0] for values in spectra.values())
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    made.add_column("layers", no_wrap=True)
    made.add_column(f"largest {quantity}, 0 to {_number(top, unit)}", style="cyan", no_wrap=True)
    for name in ("median", "max"):
        made.add_column(name, justify="right", min_width=6)
    for heading, rows in _sections(spectra).items():
        if heading:
            made.add_row(Text(heading, style="bold"))
        for label, layers in rows.items():
            largest = [values[0] for values in layers]
            heights = [int(value / (top or 1.0) * len(bars)) for value in largest]
            line = "".join(bars[min(height, len(bars) - 1)] for height in heights)
            everything = [value for values in layers for value in values]
            label = f"  {label}" if heading else label
            made.add_row(Text(label), line, _number(median(everything), unit), _number(max(largest), unit))
    return made


def picture(spectra: Spectra, quantity: str, unit: str, title: str) -> Image.Image:
    """A panel for each group: its blocks from left to right, a dot for each value, a line at the median.

    Args:
        spectra, quantity, unit: as for :func:`table`.
        title: written at the top.

    Returns:
        An RGB picture, 1094 px wide.
    """
    sections = _sections(spectra)
    rows = sum(math.ceil(len(section) / _COLUMNS) for section in sections.values())
    row_height = _PANEL[1] + 3 * _LINE
    width = _AXIS + _COLUMNS * (_PANEL[0] + _GAP)
    height = 4 * _LINE + rows * row_height + sum(_LINE for heading in sections if heading)
    canvas = _Canvas(width, height)
    canvas.text(_GAP, 1.2 * _LINE, title, _INK, _FONT + 3)
    legend = f"a column for each block; dots: the {quantity}s of its layer; line: their median"
    canvas.text(_GAP, 2.3 * _LINE, legend, _SOFT_INK)
    scale = _Scale(max(values[0] for values in spectra.values()) or 1.0, unit)
    y = 3.5 * _LINE
    for heading, section in sections.items():
        if heading:
            canvas.text(_GAP, y + _LINE / 2, heading, _INK, _FONT + 2)
            y += _LINE
        for number, (label, layers) in enumerate(section.items()):
            column = number % _COLUMNS
            if number and column == 0:
                y += row_height
            x = _AXIS + column * (_PANEL[0] + _GAP)
            canvas.panel(x, y + 1.5 * _LINE, label, layers, scale, numbered=column == 0)
        y += row_height
    return canvas.image.resize((width, height), Image.Resampling.LANCZOS)


class _Scale(NamedTuple):
    """The vertical axis of all panels, from 0."""

    top: float
    unit: str

    def marks(self) -> list[float]:
        """Round numbers, two to four of them."""
        magnitude = 10 ** math.floor(math.log10(self.top))
        step = next(s for s in (0.2, 0.5, 1, 2, 5) if self.top / (s * magnitude) < 4) * magnitude
        return [step * number for number in range(int(self.top / step) + 1)]


class _Canvas:
    """Draws in the finished picture's pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
        self._pen = ImageDraw.Draw(self.image, "RGBA")

    def text(
        self, x: float, y: float, text: str, ink: tuple[int, ...], size: int = _FONT, anchor: str = "lm"
    ) -> None:
        font = ImageFont.load_default(size * _SCALE)
        self._pen.text((x * _SCALE, y * _SCALE), text, ink, font, anchor=anchor)

    def box(self, x0: float, y0: float, x1: float, y1: float, ink: tuple[int, ...]) -> None:
        self._pen.rectangle([v * _SCALE for v in (x0, y0, x1, y1)], ink)

    def dot(self, x: float, y: float, radius: float, ink: tuple[int, ...]) -> None:
        self._pen.ellipse([v * _SCALE for v in (x - radius, y - radius, x + radius, y + radius)], ink)

    def panel(
        self, x: float, y: float, label: str, layers: list[Sequence[float]], scale: _Scale, numbered: bool
    ) -> None:
        """One panel with its upper left corner at (x, y), below the label; `numbered` marks are labelled."""
        width, height = _PANEL

        def level(value: float) -> float:
            return y + height * (1 - value / scale.top)

        shown = label if len(label) <= _LONGEST else f"...{label[3 - _LONGEST :]}"
        self.text(x, y - 0.6 * _LINE, shown, _INK)
        for mark in scale.marks():
            self.box(x, level(mark) - 0.5, x + width, level(mark) + 0.5, _GRID)
            if numbered:
                self.text(x - 6, level(mark), f"{mark:.3g}{scale.unit}", _SOFT_INK, _SMALL_FONT, "rm")
        step = width / len(layers)
        radius, half = min(2.4, max(1.2, step / 5)), min(7.0, 0.4 * step)
        for block, values in enumerate(layers):
            middle = x + (block + 0.5) * step
            for value in values:
                self.dot(middle, level(value), radius, _DOT)
            line = level(median(values))
            self.box(middle - half, line - 0.8, middle + half, line + 0.8, _MEDIAN)
            if block in (0, len(layers) - 1):
                self.text(middle, y + height + 0.5 * _LINE, str(block), _SOFT_INK, _SMALL_FONT, "mm")


def _sections(spectra: Spectra) -> dict[str, dict[str, list[Sequence[float]]]]:
    """The groups' values by the list of blocks that they are in ("" for none) and the rest of their name."""
    sections: dict[str, dict[str, list[Sequence[float]]]] = {}
    for name, paths in grouped(list(spectra)).items():
        heading, star, label = name.partition(".*.")
        heading, label = (heading, label) if star else ("", name)
        sections.setdefault(heading, {})[label] = [spectra[path] for path in paths]
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
