"""Line charts with logarithmic axes, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Style = Literal["solid", "dashed", "dots"]
Point = tuple[float, float]

_SCALE = 3  # drawn larger and reduced, which smooths the edges
_PANEL, _LEFT, _RIGHT, _TOP, _BOTTOM = (300, 210), 62, 22, 34, 50
_MARGIN, _LINE = 18, 20
_FONT, _SMALL_FONT = 13, 11
_PAPER, _INK, _SOFT_INK, _GRID = (255, 255, 255), (25, 25, 25), (110, 110, 110), (230, 230, 230)
_DASH, _RADIUS = (5, 4), 2.4


@dataclass
class Line:
    """One curve. Points beyond the panel's ticks are left out, those below them drawn at the lowest tick."""

    x: Sequence[float]
    y: Sequence[float]
    color: Color
    style: Style = "solid"


@dataclass
class Panel:
    """Curves on two logarithmic axes, with their ticks by value."""

    title: str
    x_label: str
    y_label: str
    x_ticks: dict[float, str]
    y_ticks: dict[float, str]
    lines: list[Line] = field(default_factory=list)


Legend = Sequence[tuple[str, Color, Style]]


def figure(title: str, notes: Sequence[str], legend: Legend, rows: Sequence[Sequence[Panel]]) -> Image.Image:
    """Draw panels in rows, under a title, lines of notes and one legend; returns an RGB picture."""
    cell = _LEFT + _PANEL[0] + _RIGHT, _TOP + _PANEL[1] + _BOTTOM
    header = _MARGIN + _LINE * (len(notes) + 3)
    size = 2 * _MARGIN + cell[0] * max(map(len, rows)), header + cell[1] * len(rows) + _MARGIN
    pen = _Pen(*size)
    pen.text(_MARGIN, _MARGIN + _LINE / 2, title, _INK, _FONT + 5)
    for number, note in enumerate(notes):
        pen.text(_MARGIN, _MARGIN + _LINE * (number + 1.7), note, _SOFT_INK)
    x, y = float(_MARGIN), _MARGIN + _LINE * (len(notes) + 2.2)
    for label, color, style in legend:
        pen.curve([(x + 11 * step, y) for step in range(3)], color, style)
        pen.text(x + 30, y, label, _INK)
        x += 30 + pen.width(label) + 26
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            _draw(pen, panel, _MARGIN + column * cell[0] + _LEFT, header + row * cell[1] + _TOP)
    return pen.image.resize(size, Image.Resampling.LANCZOS)


class _Pen:
    """Draws in the finished picture's pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * _SCALE, height * _SCALE), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, ink: Color, size: int = _FONT, anchor: str = "lm") -> None:
        font = ImageFont.load_default(size * _SCALE)
        self._draw.text((x * _SCALE, y * _SCALE), text, ink, font, anchor=anchor)

    def width(self, text: str) -> float:
        return ImageFont.load_default(_FONT).getlength(text)

    def line(self, points: Sequence[Point], ink: Color, width: float = 1.8) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self._draw.line(scaled, ink, round(width * _SCALE), joint="curve")

    def dot(self, x: float, y: float, ink: Color) -> None:
        box = [v * _SCALE for v in (x - _RADIUS, y - _RADIUS, x + _RADIUS, y + _RADIUS)]
        self._draw.ellipse(box, ink)

    def curve(self, points: Sequence[Point], ink: Color, style: Style) -> None:
        if style == "dots":
            for x, y in points:
                self.dot(x, y, ink)
        elif style == "solid":
            self.line(points, ink)
        else:
            for dash in _dashes(points):
                self.line(dash, ink, 1.2)


def _draw(pen: _Pen, panel: Panel, left: float, top: float) -> None:
    """A panel whose axes' upper left corner is (left, top)."""
    width, height = _PANEL
    right, bottom = left + width, top + height
    pen.text(left, top - 16, panel.title, _INK)
    for value, label in panel.x_ticks.items():
        x = left + width * _share(value, panel.x_ticks)
        pen.line([(x, top), (x, bottom)], _GRID, 1)
        pen.text(x, bottom + 12, label, _SOFT_INK, _SMALL_FONT, "mm")
    for value, label in panel.y_ticks.items():
        y = bottom - height * _share(value, panel.y_ticks)
        pen.line([(left, y), (right, y)], _GRID, 1)
        pen.text(left - 6, y, label, _SOFT_INK, _SMALL_FONT, "rm")
    pen.text(left + width / 2, bottom + 29, panel.x_label, _SOFT_INK, anchor="mm")
    pen.text(right, top - 16, panel.y_label, _SOFT_INK, _SMALL_FONT, "rm")
    for line in panel.lines:
        places = (
            (_share(x, panel.x_ticks), max(_share(y, panel.y_ticks), 0.0))
            for x, y in zip(line.x, line.y, strict=True)
        )
        points = [(left + width * x, bottom - height * y) for x, y in places if 0 <= x <= 1 and 0 <= y <= 1]
        pen.curve(points, line.color, line.style)


def _share(value: float, ticks: dict[float, str]) -> float:
    """Where a value lies between the smallest tick (0) and the largest (1)."""
    low, high = math.log(min(ticks)), math.log(max(ticks))
    return (math.log(value) - low) / (high - low) if value > 0 else -1.0


def _dashes(points: Sequence[Point]) -> Iterator[list[Point]]:
    """The dashes along a polyline."""
    drawn, period = 0.0, sum(_DASH)
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        length = math.hypot(x1 - x0, y1 - y0)
        at = 0.0
        while at < length:
            phase = drawn % period
            on = phase < _DASH[0]
            step = min((_DASH[0] if on else period) - phase, length - at)
            if on:
                ends = (at / length, (at + step) / length)
                yield [(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part) for part in ends]
            at, drawn = at + step, drawn + step
