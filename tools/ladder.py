"""docs/ladder.svg: the memory ladder as bars on a logarithmic axis, from bench/results/ladder.jsonl."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from drawing import FAINT, INK, RULE, text
from edgetune.units import format_bytes

FILE = Path(__file__).resolve().parent.parent / "docs" / "ladder.svg"
BARS = (
    ("peak_bytes", "measured at the allocator", "#6b6862"),
    ("arena_bytes", "arena, layer by layer", "#7fb5b1"),
    ("streamed_bytes", "arena, by rows and channels", "#0b7a75"),
)
PUBLISHED = "#b0552f"
LOW, HIGH = 5e4, 1e9  # bytes
WIDTH, LEFT, RIGHT, TOP = 920, 170, 100, 64
BAR, RUNG = 14, 66  # height of a bar, and of a rung with its space


def documents(rows: list[dict[str, Any]]) -> dict[Path, str]:
    """The picture of the newest rows, or nothing where none are measured."""
    own = [row for row in rows if row["suite"] == "ladder" and not row["quick"]]
    rungs = {row["method"]: row for row in own if "peak_bytes" in row}
    return {FILE: picture(list(rungs.values()))} if rungs else {}


def picture(rungs: list[dict[str, Any]]) -> str:
    """SVG: a group of bars for each rung, and a mark where the published number lies."""
    height = TOP + RUNG * len(rungs) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        *_legend(),
        *_axis(height - 30),
    ]
    for index, row in enumerate(rungs):
        parts += _rung(row, TOP + RUNG * index)
    return "\n".join([*parts, "</svg>"]) + "\n"


def x_of(size: float) -> float:
    """Where a number of bytes lies."""
    share = (math.log10(size) - math.log10(LOW)) / (math.log10(HIGH) - math.log10(LOW))
    return LEFT + (WIDTH - LEFT - RIGHT) * share


def _rung(row: dict[str, Any], top: float) -> list[str]:
    parts = [text(LEFT - 12, top + 1.5 * BAR + 4, row["method"], INK, "end")]
    for place, (field, _, colour) in enumerate(BARS):
        if row.get(field) is not None:
            y, end = top + place * BAR, x_of(row[field])
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR - 2}" fill="{colour}"/>')
            parts.append(text(end + 6, y + BAR - 4, format_bytes(row[field]), FAINT, "start", 11))
    x = x_of(row["published_bytes"])
    parts.append(f'<path d="M{x:.1f} {top - 4} v{3 * BAR + 6}" stroke="{PUBLISHED}" stroke-width="2.5"/>')
    return parts


def _axis(bottom: float) -> list[str]:
    parts = []
    for power in range(5, 10):
        x = x_of(10**power)
        name = {5: "100 KB", 6: "1 MB", 7: "10 MB", 8: "100 MB", 9: "1 GB"}[power]
        parts.append(f'<path d="M{x:.1f} {TOP - 12} V{bottom}" stroke="{RULE}"/>')
        parts.append(text(x, bottom + 16, name, FAINT, "middle"))
    return parts


def _legend() -> list[str]:
    parts, x = [], LEFT
    for _, name, colour in BARS:
        parts.append(f'<rect x="{x}" y="20" width="12" height="12" fill="{colour}"/>')
        parts.append(text(x + 18, 31, name, INK, "start"))
        x += 34 + 7 * len(name)
    parts.append(f'<path d="M{x + 6} 17 v18" stroke="{PUBLISHED}" stroke-width="2.5"/>')
    parts.append(text(x + 18, 31, "published", INK, "start"))
    return parts
