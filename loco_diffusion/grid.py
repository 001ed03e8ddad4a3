"""A labelled grid of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_FONT = 16
_SMALL_FONT = 13
_GAP = 8
_INK, _SOFT_INK, _PAPER = (20, 20, 20), (100, 100, 100), (255, 255, 255)


def picture_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    side: int = 256,
) -> Image.Image:
    """Draw pictures in rows and columns, with labels above and at the left.

    Args:
        rows: RGB pictures, all of one shape and as many in each row as there are `column_labels`.
        row_labels: one a row; further lines after the first are smaller.
        column_labels: one a column.
        side: longer side of each picture in the grid, in pixels.

    Returns:
        An RGB picture.
    """
    font, small = ImageFont.load_default(_FONT), ImageFont.load_default(_SMALL_FONT)
    scale = side / max(rows[0][0].size)
    width, height = (round(length * scale) for length in rows[0][0].size)
    margin = 2 * _GAP + max(
        int((font if number == 0 else small).getlength(line))
        for label in row_labels
        for number, line in enumerate(label.split("\n"))
    )
    header = _FONT + 2 * _GAP
    size = (margin + len(column_labels) * (width + _GAP), header + len(rows) * (height + _GAP))
    grid = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        pen.text((margin + column * (width + _GAP) + width / 2, header / 2), label, _INK, font, anchor="mm")
    for row, (label, pictures) in enumerate(zip(row_labels, rows, strict=True)):
        top = header + row * (height + _GAP)
        _write(pen, label, top + height / 2, font, small)
        for column, picture in enumerate(pictures):
            shown = picture.resize((width, height), Image.Resampling.LANCZOS)
            grid.paste(shown, (margin + column * (width + _GAP), top))
    return grid


def _write(
    pen: ImageDraw.ImageDraw,
    label: str,
    middle: float,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    small: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """Lines of text at the left margin, centred around the height `middle`."""
    lines = label.split("\n")
    spacing = _FONT + 4
    top = middle - spacing * (len(lines) - 1) / 2
    for number, line in enumerate(lines):
        style = (_INK, font) if number == 0 else (_SOFT_INK, small)
        pen.text((_GAP, top + number * spacing), line, *style, anchor="lm")
