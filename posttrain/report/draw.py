"""Curves on a terminal, in plain letters, and as a PNG."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from posttrain.report.console import is_live
from posttrain.report.curve import HOW, Curve, Panel, Picture

COLUMNS, ROWS = 61, 13
MARKS = "*o+x"
BOTH = "#"
COLOURS = (36, 33, 35, 32)
"""Of a terminal: cyan, yellow, magenta, green."""
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bits of a braille character, by row and column."""


def fancy(stream: TextIO | None = None) -> bool:
    """Whether colours and braille dots are wanted: on a terminal that can show them."""
    stream = sys.stdout if stream is None else stream
    return is_live(stream) and "utf" in (stream.encoding or "").lower()


def text(drawn: Sequence[Picture], live: bool = False) -> str:
    """The pictures as text: with colours and braille dots when ``live``, else letters that every file and log can hold."""
    lines = [f"weights ({HOW})"]
    for picture in drawn:
        for panel in picture.panels:
            lines += ["", f"  {picture.stream}: {panel.title}", *_panel(panel, live)]
        lines += ([] if picture.panels else ["", f"  {picture.stream}"]) + [f"  {note}" for note in picture.notes]
    return "\n".join(lines)


def _panel(panel: Panel, live: bool) -> list[str]:
    low, high = bounds(panel.curves)
    grid = _dots(panel, low, high) if live else _letters(panel, low, high)
    labels = {0: f"{high:.3g}", ROWS - 1: f"{low:.3g}"}
    if low < 0 < high:
        labels.setdefault(_row(0.0, low, high, ROWS), "0")
    width = max(map(len, labels.values()))
    lines = [f"    {labels.get(row, ''):>{width}} |{cells}" for row, cells in enumerate(grid)]
    start, end = f"{panel.curves[0].x[0]:g}", f"{panel.curves[0].x[-1]:g}"
    lines.append(f"    {'':>{width}} +{'-' * COLUMNS}")
    lines.append(f"    {'':>{width}}  {start}{panel.axis:^{COLUMNS - len(start) - len(end)}}{end}")
    if panel.curves[0].label != "every token":
        keys = [_coloured(c.label, i) if live else f"{MARKS[i]} {c.label}" for i, c in enumerate(panel.curves)]
        lines.append(f"    {'':>{width}}  {'   '.join(keys)}" + ("" if live else f"   {BOTH} several"))
    return [line.rstrip() for line in lines]


def bounds(curves: Sequence[Curve]) -> tuple[float, float]:
    """The range of the weights, 0 in it; never empty."""
    values = [0.0, *(y for c in curves for y in c.y if y is not None)]
    low, high = min(values), max(values)
    return (-1.0, 1.0) if low == high else (low, high)


def nearest(curve: Curve, x: float) -> float | None:
    """The value at the point of the curve nearest to ``x``: a jump stays a jump."""
    return min(zip(curve.x, curve.y, strict=True), key=lambda point: abs(point[0] - x))[1]


def _row(y: float, low: float, high: float, rows: int) -> int:
    return round((high - y) / (high - low) * (rows - 1))


def _places(curve: Curve, low: float, high: float, columns: int, rows: int) -> Iterator[tuple[int, int]]:
    first, last = curve.x[0], curve.x[-1]
    for column in range(columns):
        y = nearest(curve, first + (last - first) * column / (columns - 1))
        if y is not None:
            yield _row(y, low, high, rows), column


def _letters(panel: Panel, low: float, high: float) -> list[str]:
    grid = [[" "] * COLUMNS for _ in range(ROWS)]
    grid[_row(0.0, low, high, ROWS)] = ["-"] * COLUMNS
    for mark, curve in zip(MARKS, panel.curves, strict=False):
        for row, column in _places(curve, low, high, COLUMNS, ROWS):
            grid[row][column] = mark if grid[row][column] in " -" else BOTH
    return ["".join(row) for row in grid]


def _dots(panel: Panel, low: float, high: float) -> list[str]:
    bits, owner = [[0] * COLUMNS for _ in range(ROWS)], [[-1] * COLUMNS for _ in range(ROWS)]
    for number, curve in enumerate(panel.curves):
        for row, column in _places(curve, low, high, 2 * COLUMNS, 4 * ROWS):
            bits[row // 4][column // 2] |= DOTS[row % 4][column % 2]
            owner[row // 4][column // 2] = number
    zero = _row(0.0, low, high, 4 * ROWS) // 4
    out = []
    for row in range(ROWS):
        cells = [(chr(0x2800 + b) if b else "─" if row == zero else " ", i) for b, i in zip(bits[row], owner[row], strict=True)]
        runs = ((i, "".join(c for c, _ in run)) for i, run in itertools.groupby(cells, key=lambda cell: cell[1]))
        out.append("".join(run if i < 0 else _coloured(run, i) for i, run in runs))
    return out


def _coloured(word: str, number: int) -> str:
    return f"\033[{COLOURS[number % len(COLOURS)]}m{word}\033[0m"


# -- PNG -------------------------------------------------------------------------------------------------------------------------
WIDTH, HEIGHT, SCALE = 560, 330, 2
INKS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167))
"""Colours that are told apart by people who see few of them."""


def png(drawn: Mapping[str, Sequence[Picture]], path: Path) -> None:
    """Write the pictures of every title, one row per stream, to ``path``.

    Raises ``ValueError`` when the file name does not end in .png, there is no such folder, nothing is to be drawn, or Pillow is missing.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"png={path}: the name of the file must end in .png")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"png={path}: there is no folder {path.absolute().parent}")
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ValueError(f"png={path} needs the package Pillow, which TensorBoard brings along; install pillow") from error
    rows = [(title, picture) for title, each in drawn.items() for picture in each if picture.panels]
    if not rows:
        raise ValueError(f"png={path}: " + "; ".join(note for each in drawn.values() for picture in each for note in picture.notes))
    columns = max(len(picture.panels) for _, picture in rows)
    image = Image.new("RGB", (columns * WIDTH * SCALE, len(rows) * HEIGHT * SCALE), "white")
    draw = ImageDraw.Draw(image)
    for row, (title, picture) in enumerate(rows):
        for column, panel in enumerate(picture.panels):
            _frame(draw, panel, f"{title}, {picture.stream}: {panel.title}", column * WIDTH * SCALE, row * HEIGHT * SCALE)
    image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.BOX).save(path)


def _frame(draw: Any, panel: Panel, title: str, left: int, top: int) -> None:
    from PIL import ImageFont

    font, small = ImageFont.load_default(13 * SCALE), ImageFont.load_default(11 * SCALE)
    low, high = bounds(panel.curves)
    first, last = panel.curves[0].x[0], panel.curves[0].x[-1]
    x0, x1, y0, y1 = (v * SCALE for v in (68, WIDTH - 16, 34, HEIGHT - 62))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x0 + (x - first) / (last - first) * (x1 - x0), top + y0 + (high - y) / (high - low) * (y1 - y0)

    draw.text((left + x0, top + 8 * SCALE), title, fill="black", font=font)
    for k in range(5):
        x, y = first + (last - first) * k / 4, low + (high - low) * k / 4
        (px, _), (_, py) = place(x, low), place(first, y)
        draw.line([(px, top + y0), (px, top + y1)], fill=(232, 232, 232), width=SCALE)
        draw.line([(left + x0, py), (left + x1, py)], fill=(232, 232, 232), width=SCALE)
        draw.text((px, top + y1 + 4 * SCALE), f"{x:g}", fill="black", font=small, anchor="ma")
        draw.text((left + x0 - 6 * SCALE, py), f"{y:.3g}", fill="black", font=small, anchor="rm")
    draw.line([place(first, 0.0), place(last, 0.0)], fill=(130, 130, 130), width=SCALE)
    draw.rectangle([left + x0, top + y0, left + x1, top + y1], outline="black", width=SCALE)
    draw.text((left + (x0 + x1) / 2, top + y1 + 20 * SCALE), panel.axis, fill="black", font=small, anchor="ma")
    at = left + x0
    for ink, curve in zip(INKS, panel.curves, strict=False):
        for piece in _pieces(curve):
            draw.line([place(x, y) for x, y in piece], fill=ink, width=2 * SCALE + 1, joint="curve")
        draw.line([(at, top + y1 + 46 * SCALE), (at + 22 * SCALE, top + y1 + 46 * SCALE)], fill=ink, width=2 * SCALE + 1)
        draw.text((at + 28 * SCALE, top + y1 + 46 * SCALE), curve.label, fill="black", font=small, anchor="lm")
        at += 40 * SCALE + draw.textlength(curve.label, font=small)


def _pieces(curve: Curve) -> Iterator[list[tuple[float, float]]]:
    """The curve in pieces, broken where it has no value."""
    for known, points in itertools.groupby(zip(curve.x, curve.y, strict=True), key=lambda point: point[1] is not None):
        if known:
            yield [(x, y) for x, y in points if y is not None]
