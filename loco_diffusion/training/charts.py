"""The curves of a run, as drawings for the report page and the model card."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Curve = Sequence[tuple[float, float]]
"""Steps and values, in the order of the steps."""

_WIDTH, _HEIGHT = 4.6, 2.5  # inches
_MARKED = 40  # points at most are drawn as dots, too


@dataclass(frozen=True)
class Chart:
    """A panel of curves over steps.

    Attributes:
        title: what is shown, with its unit.
        curves: by their name in the legend.
        lines: values to compare with, by name.
        logarithmic: whether values span orders of magnitude.
    """

    title: str
    curves: Mapping[str, Curve]
    lines: Mapping[str, float] = field(default_factory=dict)
    logarithmic: bool = False


def draw_chart(chart: Chart) -> str:
    """The panel as an SVG document."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    axes = figure.subplots()
    figure.subplots_adjust(
        left=0.17, right=0.98, bottom=0.17, top=0.89
    )  # a layout engine takes twice the time
    axes.set_title(chart.title, fontsize=10, loc="left")
    for name, curve in chart.curves.items():
        steps, values = zip(*curve, strict=True)
        axes.plot(
            steps,
            values,
            linewidth=1.6,
            marker="o" if len(curve) <= _MARKED else "",
            markersize=3,
            label=name,
        )
    for (name, value), style in zip(chart.lines.items(), ("--", ":", "-.") * len(chart.lines), strict=False):
        axes.axhline(value, color="0.35", linewidth=1, linestyle=style, label=name)
    if chart.logarithmic and all(value > 0 for curve in chart.curves.values() for _, value in curve):
        axes.set_yscale("log")
    if len(chart.curves) + len(chart.lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    axes.set_xlabel("step", fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.tick_params(which="both", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    return stream.getvalue()
