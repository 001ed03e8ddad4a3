"""Layers in groups, a row of bars and a panel for each."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from loco_diffusion.spectra import grouped, picture, table

SPECTRA = {
    **{f"blocks.{n}.attn.to_out.0": [10.0 + n, 2.0, 1.0] for n in range(11)},
    **{f"blocks.{n}.ff.net.{i}": [1.0 * n] for n in range(2) for i in (0, 2)},
    "proj_out": [40.0, 0.0],
}


def test_layers_that_differ_in_the_block_are_grouped() -> None:
    groups = grouped(list(SPECTRA))
    assert list(groups) == ["blocks.*.attn.to_out.0", "blocks.*.ff.net.*", "proj_out"]
    assert groups["blocks.*.attn.to_out.0"][:3] == [f"blocks.{n}.attn.to_out.0" for n in range(3)]
    assert groups["blocks.*.attn.to_out.0"][-1] == "blocks.10.attn.to_out.0"
    assert grouped(["a.0.attn1.to_q", "a.0.attn2.to_q"]).keys() == {"a.0.attn1.to_q", "a.0.attn2.to_q"}


@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_table_has_a_bar_for_each_layer(ascii_only: bool) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(SPECTRA, "angle", "°", ascii_only=ascii_only))
    lines = console.export_text().splitlines()
    assert "largest angle, 0 to 40.0°" in lines[0] and "R Rᵀ" not in lines[0]
    assert [line.split() for line in lines[1:]] == [
        ["blocks"],
        ["attn.to_out.0", "-----=====+" if ascii_only else "▃▃▃▃▃▄▄▄▄▄▅", "2.0°", "20.0°"],
        ["ff.net.*", "...." if ascii_only else "▁▁▁▁", "0.5°", "1.0°"],
        ["proj_out", "@" if ascii_only else "█", "20.0°", "40.0°"],
    ]
    assert lines[2].startswith("  attn") and lines[4].startswith("proj")


def test_the_table_has_the_largest_error_of_each_row() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    errors = {path: 1e-7 * (1 + number) for number, path in enumerate(SPECTRA)}
    console.print(table(SPECTRA, "angle", "°", errors))
    lines = console.export_text().splitlines()
    assert lines[0].rstrip().endswith("R Rᵀ - I")
    assert [line.split()[-1] for line in lines[2:]] == ["1.1e-06", "1.5e-06", "1.6e-06"]


@pytest.mark.parametrize("spectra", [SPECTRA, {"only": [0.0]}, {"a.0": [1e-5], "a.1": [2e-9]}])
def test_the_picture(spectra: dict[str, list[float]]) -> None:
    drawn = picture(spectra, "singular value", "", "Title")
    colours = {colour for _, colour in drawn.getcolors(2**20)}
    assert (255, 127, 14) in colours  # a median
    assert drawn.width == 1200 and drawn.height > 200


def test_the_picture_has_a_dot_for_each_value() -> None:
    few, many = (
        picture({"layer": values}, "angle", "°", "") for values in ([9.0, 1.0], [9.0, 5.0, 4.0, 1.0])
    )
    blue = [
        sum(count for count, (red, _, blue) in image.getcolors(2**20) if blue > red + 40)
        for image in (few, many)
    ]
    assert 0 < blue[0] < blue[1]
