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

from edgetune.units import format_bytes, format_count

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


def macs(field: str) -> Format:
    """Multiply-accumulates with a decimal prefix."""
    return lambda row: format_count(row[field]) if row.get(field) is not None else "-"


def against(field: str) -> Format:
    """Bytes of the method, and of the baseline measured beside it."""
    return lambda row: f"{size(field)(row)} of {size(field + '_baseline')(row)}"


def spread(mean: str, deviation: str) -> Format:
    """Mean ± standard deviation; the mean alone where there was one run."""
    both = [number(mean, 1), number(deviation, 1)]
    return lambda row: " ± ".join(form(row) for form in both if form(row) != "-")


def percent(field: str) -> Format:
    """A share as a percentage."""
    return lambda row: f"{100 * row[field]:.1f} %" if row.get(field) is not None else "-"


def interval(row: Row) -> str:
    """The difference to the plain run with its paired 95 % interval."""
    if row.get("accuracy_difference") is None:
        return "-"
    low, high = row["difference_low"], row["difference_high"]
    return f"{row['accuracy_difference']:+.1f} ({low:+.1f} to {high:+.1f})"


@dataclass(frozen=True)
class Table:
    """One table: which rows, what tells them apart (a later line replaces an earlier one), what is shown.

    `medians` are the fields of a last line a patch size, which has the medians over the rows shown.
    """

    suite: str
    key: tuple[str, ...]
    columns: dict[str, Format]
    where: Callable[[Row], bool] = lambda row: True
    medians: tuple[str, ...] = ()

    def takes(self, row: Row) -> bool:
        """Whether a row belongs here; trial runs on a few pictures, or fewer than three runs, belong nowhere."""
        enough = row.get("seeds") is None or row["seeds"] >= 3
        return row["suite"] == self.suite and not row.get("quick") and enough and self.where(row)

    def lines(self, rows: Iterable[Row]) -> list[str]:
        """The markdown of the rows of one machine."""
        shown = list({tuple(str(row.get(name)) for name in self.key): row for row in rows}.values())
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
        medians = {name: statistics.median(found) for name, found in values.items() if found}
        return {"case": "**median**", "patch_px": patch_px, **medians}


def layers(taps: str) -> Table:
    """Single convolutions with one form of gradient filtering."""
    return Table(
        suite="layers",
        where=lambda row: row["taps"] == taps,
        key=("case", "patch_px", "batch"),
        columns={
            "layer": text("case"),
            "patch": text("patch_px"),
            "exact backward": number("baseline_ms", 1, " ms"),
            "with un-pooling": number("backward_speedup", 1, "x"),
            "on the grid": number("grid_speedup", 1, "x"),
            "keeping, of forward": percent("keep_overhead"),
            "kept": against("kept_bytes"),
            "cosine": number("cosine"),
            "scale": number("scale"),
        },
        medians=("backward_speedup", "grid_speedup", "keep_overhead", "cosine", "scale"),
    )


def steps(where: Callable[[Row], bool] = lambda row: True) -> Table:
    """Whole training steps: all of them, or those of `where`."""
    return Table(
        suite="steps",
        where=where,
        key=("case", "method", "patch_px", "taps", "batch"),
        columns={
            "step": text("case"),
            "method": text("method"),
            "patch": text("patch_px"),
            "batch": text("batch"),
            "plain": number("baseline_ms", 0, " ms"),
            "this": number("method_ms", 0, " ms"),
            "speedup": number("speedup", 2, "x"),
            "above forward alone": percent("over_forward"),
            "kept": against("kept_bytes"),
            "peak": against("peak_bytes"),
        },
    )


def codec(where: Callable[[Row], bool]) -> Table:
    """Codecs on maps of networks in training."""
    return Table(
        suite="codec",
        where=where,
        key=("case", "codec", "bound"),
        columns={
            "maps": text("case"),
            "bound": text("bound"),
            "codec": text("codec"),
            "ratio": number("ratio", 2, "x"),
            "by entropy at most": number("entropy_ratio", 2, "x"),
            "encode": number("encode_gb_s", 2, " GB/s"),
            "decode": number("decode_gb_s", 2, " GB/s"),
            "largest error, in bounds": number("error", 4, ""),
            "in deviations": number("deviations", 4, ""),
            "zeros kept": percent("zeros_kept"),
        },
    )


def arithmetic(suite: str, where: Callable[[Row], bool]) -> Table:
    """Convolutions by other arithmetic than float products."""
    return Table(
        suite=suite,
        where=lambda row: "whole" not in row["case"] and where(row),
        key=("case", "method", "batch", "threads"),
        columns={
            "layer": text("case"),
            "method": text("method"),
            "batch": text("batch"),
            "best float": number("baseline_ms", 3, " ms"),
            "which": text("baseline"),
            "this": number("method_ms", 3, " ms"),
            "speedup": number("speedup", 1, "x"),
            "over int8": number("int8_speedup", 1, "x"),
            **({"over the float adder": number("adder_speedup", 1, "x")} if suite == "adder" else {}),
            "G MAC/s": number("gmac_s", 0),
        },
    )


def whole(suite: str, network: str = "") -> Table:
    """Packed networks against their float originals: all of them, or those of one name."""
    return Table(
        suite=suite,
        where=lambda row: "whole" in row["case"] and row["case"].startswith(network),
        key=("case", "method", "batch", "threads"),
        columns={
            "network": text("case"),
            "method": text("method"),
            "batch": text("batch"),
            "contiguous": number("contiguous_ms", 1, " ms"),
            "channels last": number("channels_last_ms", 1, " ms"),
            "compiled": number("compiled_ms", 1, " ms"),
            "packed": number("method_ms", 1, " ms"),
            "to the best": number("speedup", 1, "x"),
            "smaller file": number("ratio", 1, "x"),
        },
    )


TABLES = {
    "binary": arithmetic("binary", lambda row: row["batch"] == 1 and row["method"].startswith("bits")),
    "binary-other": arithmetic("binary", lambda row: row["batch"] == 1 and not row["method"].startswith("bits")),
    "binary-batch": arithmetic("binary", lambda row: row["batch"] == 8 and row["method"] == "bits to floats"),
    "binary-whole": whole("binary"),
    "binary-resnet18": whole("binary", "resnet18"),
    "adder-whole": whole("adder"),
    "adder": arithmetic("adder", lambda row: True),
    "arithmetic": Table(
        suite="arithmetic",
        key=("case", "method"),
        columns={
            "network": text("case"),
            "method": text("method"),
            "accuracy %": spread("accuracy_mean", "accuracy_sd"),
            "to plain (95 %)": interval,
            "packed": number("packed_accuracy", 1),
            "in another class": text("packed_other"),
            "rate": text("rate"),
            "kept": size("kept_bytes"),
            "runs": text("seeds"),
        },
    ),
    "layers": layers("mean"),
    "layers-grid": layers("grid"),
    "steps": steps(),
    "steps-whole": steps(lambda row: row["depth"] == "all" and row["size_px"] == 224),
    "held": Table(
        suite="held",
        key=("case", "method", "batch"),
        columns={
            "step": text("case"),
            "method": text("method"),
            "batch": text("batch"),
            "plain": number("baseline_ms", 0, " ms"),
            "this": number("method_ms", 0, " ms"),
            "speedup": number("speedup", 2, "x"),
            "kept": against("kept_bytes"),
            "peak": against("peak_bytes"),
        },
    ),
    "cache": Table(
        suite="cache",
        key=("case", "method", "patch_px", "taps", "codec", "batch"),
        columns={
            "what learns": text("case"),
            "method": text("method"),
            "patch": text("patch_px"),
            "codec": text("codec"),
            "a picture takes": size("sample_bytes"),
            "plain": number("baseline_ms", 0, " ms"),
            "without a cache": number("uncached_ms", 0, " ms"),
            "cached": number("method_ms", 0, " ms"),
            "to plain": number("speedup", 1, "x"),
            "to without": number("method_speedup", 1, "x"),
        },
    ),
    "codec": codec(lambda row: row["bound"] == 0.01),
    "codec-bounds": codec(lambda row: row["bound"] not in (0.01, None) and row["threads"] == 2),
    "codec-groups": codec(lambda row: row["bound"] is None and row["threads"] == 2),
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
            "kept": size("kept_bytes"),
            "runs": text("seeds"),
        },
    ),
    "budgets": Table(
        suite="budgets",
        key=("case", "method", "patch_px", "taps"),
        columns={
            "network and memory": text("case"),
            "plan": text("method"),
            "patch": text("patch_px"),
            "accuracy %": spread("accuracy_mean", "accuracy_sd"),
            "to the planner's (95 %)": interval,
            "peak": size("peak_bytes"),
            "at a time": number("micro_batch", 0, ""),
            "weights that learn": number("depth", 0, ""),
            "runs": text("seeds"),
        },
    ),
    "training": Table(
        suite="training",
        key=("case", "method", "patch_px", "taps"),
        columns={
            "what learns": text("case"),
            "method": text("method"),
            "patch": text("patch_px"),
            "accuracy %": spread("accuracy_mean", "accuracy_sd"),
            "to plain (95 %)": interval,
            "rate": text("rate"),
            "kept": size("kept_bytes"),
            "peak": size("peak_bytes"),
            "MACs back": macs("backward_macs"),
            "moved": size("moved_bytes"),
            "step": number("method_ms", 1, " ms"),
            "to plain's": number("speedup", 2, "x"),
            "runs": text("seeds"),
        },
    ),
    "ladder": Table(
        suite="ladder",
        where=lambda row: "peak_bytes" in row,
        key=("case", "method"),
        columns={
            "rung": text("method"),
            "kept": size("kept_bytes"),
            "measured peak": size("peak_bytes"),
            "arena, layer by layer": size("arena_bytes"),
            "arena, by rows and channels": size("streamed_bytes"),
            "published": size("published_bytes"),
            "MACs back": macs("backward_macs"),
        },
    ),
    "ladder-extra": Table(
        suite="ladder",
        where=lambda row: "extra_bytes" in row,
        key=("case", "method"),
        columns={
            "what learns": text("method"),
            "classes": text("classes"),
            "arena, by rows and channels": size("streamed_bytes"),
            "beyond inference": size("extra_bytes"),
            "paper's memory model": size("added_bytes"),
        },
    ),
}


def read_rows(folder: Path = RESULTS) -> list[Row]:
    """Every row of every file, in the order they were measured."""
    texts = [file.read_text() for file in sorted(folder.glob("*.jsonl"))]
    return [json.loads(line) for content in texts for line in content.splitlines() if line.strip()]


def caption(row: Row) -> str:
    """Where a row was measured, and of which version; a `+` after the commit: with changes of that day."""
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}; " if row.get("threads") else ""
    if row.get("clock") == "cpu":
        threads += "time spent on a core; "
    commit = row["git"][:7] + "+" * row["git"].endswith("+")
    return f"{row['machine']}; {threads}torch {row['versions']['torch']}; commit {commit}"


def render(name: str, rows: Iterable[Row]) -> str:
    """The table `name`, a part for each machine and number of threads, each under its caption."""
    table = TABLES[name]
    parts: dict[tuple[str, int | None], list[Row]] = {}
    for row in filter(table.takes, rows):
        parts.setdefault((row["machine"], row.get("threads")), []).append(row)
    if not parts:
        return f"*Not measured yet: `edgetune bench {table.suite}` does.*\n"
    return "\n".join("\n".join([caption(own[-1]), "", *table.lines(own), ""]) for own in parts.values())


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
