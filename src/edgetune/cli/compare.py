"""`edgetune compare`"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli import options
from edgetune.cli.output import console, emit, table
from edgetune.units import format_bytes, format_ms

if TYPE_CHECKING:
    from edgetune.contract import Plan
    from edgetune.run import Run

EXAMPLES = (
    ("edgetune compare runs/flowers-1 runs/flowers-2", "two runs side by side"),
    ("edgetune compare runs/* --json runs.json", "all of them, for a program"),
)

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders that `edgetune train` left.", show_default=False)
]


def compare(runs: Runs, json: options.Json = None) -> None:
    """Put runs side by side: what they trained, how accurate they became, and what it cost.

    Costs are measured ones where a run has them, else predicted (marked ~). Plain is the accuracy of the
    same training by plain full back-propagation.
    """
    from edgetune.contract import Plan
    from edgetune.run import PLAN, read_run

    rows = [_row(folder, read_run(folder), Plan.load(folder / PLAN)) for folder in runs]
    emit(json, lambda: {"rows": rows}, lambda: _show(rows))


def _row(folder: Path, run: Run, plan: Plan) -> dict[str, Any]:
    costs = run.costs
    cost = None if costs is None else costs.planned_measured or costs.planned_predicted
    methods = {
        f"{method.method} r={patch}" if (patch := getattr(method, "patch_px", None)) else method.method
        for stack in plan.layers.values()
        for method in stack
    }
    return {
        "run": str(folder),
        "model": run.model.name,
        "data": run.data.source,
        "status": run.status,
        "learns": len([name for name, roles in plan.learns.items() if "weight" in roles]),
        "methods": sorted(methods),
        "epochs": len(run.epochs),
        "accuracy_before": run.accuracy_before,
        "accuracy_after": run.accuracy_after,
        "accuracy_plain": run.plain.accuracy if run.plain is not None else None,
        "peak_bytes": cost.peak_bytes if cost else None,
        "kept_bytes": cost.kept_bytes if cost else None,
        "step_ms": cost.step_ms if cost else None,
        "measured": cost is not None and cost.origin == "measured",
    }


def _show(rows: list[dict[str, Any]]) -> None:
    """Runs as columns, so that names and methods have room."""
    names = (
        "model",
        "data",
        "layers that learn",
        "methods",
        "epochs",
        "accuracy before",
        "accuracy after",
        "accuracy plain",
        "peak training memory",
        "kept for backward",
        "step time",
    )
    columns = [_cells(row) for row in rows]
    lines = [(name, *(column[number] for column in columns)) for number, name in enumerate(names)]
    console().print(table("", ("", *(row["run"] for row in rows)), lines))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    about = "" if row["measured"] else "~"

    def told(name: str, write: Callable[[Any], str]) -> str:
        return "-" if row[name] is None else write(row[name])

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    after = told("accuracy_after", percent) if row["status"] == "finished" else row["status"]
    return (
        row["model"] or "-",
        Path(row["data"]).name,
        str(row["learns"]),
        ", ".join(row["methods"]) or "exact",
        str(row["epochs"]),
        percent(row["accuracy_before"]),
        after,
        told("accuracy_plain", percent),
        about + told("peak_bytes", format_bytes),
        about + told("kept_bytes", format_bytes),
        told("step_ms", format_ms),
    )
