"""docs/kept.svg: accuracy against the bytes kept for backward, a dot for each way to train one network.

From bench/results/training.jsonl. Dots are numbered from the fewest bytes on; the list beside them says which is which.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from drawing import FAINT, INK, RULE, text
from edgetune.units import format_bytes

FILE = Path(__file__).resolve().parent.parent / "docs" / "kept.svg"
CASE = "resnet20@32 last 6"
LEFT, TOP, WIDTH, HEIGHT, LIST = 64, 30, 560, 460, 340  # px; LIST is the width of the list
DOT, OURS, PLAIN = 9, "#0b7a75", "#b0552f"

Row = dict[str, Any]


def documents(rows: list[Row]) -> dict[Path, str]:
    """The picture, or nothing where nothing is measured."""
    own = [row for row in rows if row["suite"] == "training" and row["case"] == CASE and not row["quick"]
           and row["method"] != "before"]  # fmt: skip
    return {FILE: picture(sorted(own, key=lambda row: row["kept_bytes"]))} if own else {}


def picture(rows: list[Row]) -> str:
    """SVG of rows in the order of their bytes."""
    kept, reached = ([row[field] for row in rows] for field in ("kept_bytes", "accuracy_mean"))
    xs = (10 ** math.floor(math.log10(min(kept))), 10 ** math.ceil(math.log10(max(kept))))
    ys = (math.floor(min(reached)) - 1, math.ceil(max(reached)) + 1)
    width, height = LEFT + WIDTH + LIST, max(TOP + HEIGHT + 50, TOP + 19 * len(rows) + 20)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_axes(xs, ys),
        *(part for number, row in enumerate(rows, 1) for part in _row(number, row, xs, ys)),
        "</svg>",
    ]) + "\n"  # fmt: skip


def _place(row: Row, xs: tuple[float, float], ys: tuple[float, float]) -> tuple[float, float]:
    across = math.log10(row["kept_bytes"] / xs[0]) / math.log10(xs[1] / xs[0])
    return LEFT + WIDTH * across, TOP + HEIGHT * (1 - (row["accuracy_mean"] - ys[0]) / (ys[1] - ys[0]))


def _row(number: int, row: Row, xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    """A dot with its standard deviation, and its line in the list."""
    x, y = _place(row, xs, ys)
    colour = PLAIN if row["method"] == "plain" else OURS
    reach = HEIGHT * (row["accuracy_sd"] or 0) / (ys[1] - ys[0])
    name = row["method"] + (f", r={row['patch_px']}" if row["patch_px"] else "")
    line, top = LEFT + WIDTH + 24, TOP + 19 * number
    return [
        f'<path d="M{x:.1f} {y - reach:.1f} V{y + reach:.1f}" stroke="{colour}" stroke-width="1.5"/>',
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT}" fill="{colour}"/>',
        text(x, y + 4, str(number), "#ffffff", "middle", 11),
        text(line + 16, top, str(number), colour, "end"),
        text(line + 26, top, name, INK, "start"),
        text(LEFT + WIDTH + LIST - 8, top, format_bytes(row["kept_bytes"]), FAINT, "end", 11),
    ]


def _axes(xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    parts, power = [], xs[0]
    while power <= xs[1]:
        x, _ = _place({"kept_bytes": power, "accuracy_mean": ys[0]}, xs, ys)
        name = f"{power / 1e6:g} MB" if power >= 1e6 else f"{power / 1e3:g} KB"
        parts += [f'<path d="M{x:.1f} {TOP} v{HEIGHT}" stroke="{RULE}"/>',
                  text(x, TOP + HEIGHT + 18, name, FAINT, "middle")]  # fmt: skip
        power *= 10
    for value in range(int(ys[0]), int(ys[1]) + 1, 2):
        _, y = _place({"kept_bytes": xs[0], "accuracy_mean": value}, xs, ys)
        parts.append(f'<path d="M{LEFT} {y:.1f} h{WIDTH}" stroke="{RULE}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{value} %", FAINT, "end"))
    below = text(LEFT + WIDTH / 2, TOP + HEIGHT + 40, "kept for backward, measured, 32 pictures", INK, "middle")
    return [*parts, below, text(LEFT, TOP - 12, f"accuracy, {CASE}", INK, "start")]
