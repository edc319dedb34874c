"""The measured tables of README.md and docs/, rendered from bench/results/*.jsonl.

A region `<!-- table:NAME -->` ... `<!-- /table -->` holds the table NAME: written here and nowhere else.
A line of a results file is one row of a suite, with `suite`, `machine`, `git` and `versions` in it.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
REGION = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Row = dict[str, Any]
Format = Callable[[Row], str]


def number(field: str, digits: int = 2, unit: str = "") -> Format:
    """A number with so many digits after the point; a dash where the row has none."""
    return lambda row: f"{row[field]:.{digits}f}{unit}" if row.get(field) is not None else "-"


def text(field: str) -> Format:
    """The field as it stands; a dash where the row has none."""
    return lambda row: "-" if row.get(field) is None else str(row[field])


def size(field: str) -> Format:
    """Bytes in binary units."""
    return lambda row: format_bytes(row[field]) if row.get(field) is not None else "-"


def against(field: str) -> Format:
    """Bytes of the method, and of the baseline measured beside it."""
    return lambda row: f"{size(field)(row)} of {size(field + '_baseline')(row)}"


def spread(mean: str, deviation: str) -> Format:
    """Mean ± standard deviation."""
    return lambda row: f"{number(mean, 1)(row)} ± {number(deviation, 1)(row)}"


def interval(row: Row) -> str:
    """The difference to the plain run with its paired 95 % interval."""
    if row.get("accuracy_difference") is None:
        return "-"
    low, high = row["difference_low"], row["difference_high"]
    return f"{row['accuracy_difference']:+.1f} ({low:+.1f} to {high:+.1f})"


@dataclass(frozen=True)
class Table:
    """One table: which rows, what tells them apart (a later line replaces an earlier one), what is shown."""

    suite: str
    key: tuple[str, ...]
    columns: dict[str, Format]
    medians: tuple[str, ...] = ()

    def lines(self, rows: Iterable[Row]) -> list[str]:
        """The markdown of one machine's rows, with a last line of medians a patch size where asked for."""
        latest = {tuple(str(row.get(name)) for name in self.key): row for row in rows}
        shown = list(latest.values())
        if self.medians:
            shown += [
                self._median(shown, patch_px) for patch_px in sorted({row["patch_px"] for row in shown})
            ]
        head = [" | ".join(self.columns), " | ".join("---" for _ in self.columns)]
        body = [" | ".join(form(row) for form in self.columns.values()) for row in shown]
        return [f"| {line} |" for line in head + body]

    def _median(self, rows: list[Row], patch_px: int) -> Row:
        chosen = [row for row in rows if row["patch_px"] == patch_px]
        values = {name: [row[name] for row in chosen if row.get(name) is not None] for name in self.medians}
        return {
            "case": "**median**",
            "patch_px": patch_px,
            **{name: statistics.median(found) for name, found in values.items() if found},
        }


TABLES = {
    "layers": Table(
        suite="layers",
        key=("case", "patch_px", "taps", "batch", "threads"),
        columns={
            "layer": text("case"),
            "patch": text("patch_px"),
            "exact backward": number("baseline_ms", 1, " ms"),
            "with un-pooling": number("backward_speedup", 1, "x"),
            "on the grid": number("grid_speedup", 1, "x"),
            "kept": against("kept_bytes"),
            "cosine": number("cosine"),
            "scale": number("scale"),
        },
        medians=("backward_speedup", "grid_speedup", "cosine", "scale"),
    ),
    "steps": Table(
        suite="steps",
        key=("case", "method", "patch_px", "taps", "batch", "threads"),
        columns={
            "step": text("case"),
            "method": text("method"),
            "patch": text("patch_px"),
            "batch": text("batch"),
            "plain": number("baseline_ms", 0, " ms"),
            "this": number("method_ms", 0, " ms"),
            "speedup": number("speedup", 2, "x"),
            "kept": against("kept_bytes"),
            "peak": against("peak_bytes"),
        },
    ),
    "transfer": Table(
        suite="transfer",
        key=("case", "method", "patch_px", "taps"),
        columns={
            "what learns": text("case"),
            "method": text("method"),
            "patch": text("patch_px"),
            "taps": text("taps"),
            "accuracy %": spread("accuracy_mean", "accuracy_sd"),
            "to plain (95 %)": interval,
            "folds": text("seeds"),
        },
    ),
}


def read_rows(folder: Path = RESULTS) -> list[Row]:
    """Every row of every machine's file, in the order they were measured."""
    return [
        json.loads(line)
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.read_text().splitlines()
        if line.strip()
    ]


def render(name: str, rows: Iterable[Row]) -> str:
    """The table `name`, one part a machine, under a line that says where and of which version it was."""
    table = TABLES[name]
    chosen = [row for row in rows if row["suite"] == table.suite]
    if not chosen:
        return f"*Not measured yet: `edgetune bench {table.suite}` does.*\n"
    parts = []
    for machine in dict.fromkeys(row["machine"] for row in chosen):
        own = [row for row in chosen if row["machine"] == machine]
        measured = f"{machine}; torch {own[-1]['versions']['torch']}; commit {own[-1]['git'][:7]}"
        parts.append("\n".join([measured, "", *table.lines(own), ""]))
    return "\n".join(parts)


def documents(rows: list[Row] | None = None) -> dict[Path, str]:
    """README.md and the docs pages with every region filled anew. Raises KeyError for an unknown table."""
    rows = read_rows() if rows is None else rows
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {file: file.read_text() for file in files}
    return {
        file: REGION.sub(lambda m: m.group(1) + render(m["name"], rows) + m.group(3), content)
        for file, content in texts.items()
        if REGION.search(content)
    }
