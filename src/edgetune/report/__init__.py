"""Run -> report.html: one file that opens offline, on a desk or a phone, in light or dark."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgetune.apply import trace_rewritten
from edgetune.compress import weights_of
from edgetune.contract import Plan
from edgetune.errors import EdgetuneError
from edgetune.graph import Graph
from edgetune.record import atomic_write
from edgetune.report.choices import layer_views
from edgetune.report.page import Story, page
from edgetune.run import PLAN, Run, build, read_run

REPORT = "report.html"

__all__ = ["REPORT", "report"]


def report(folder: str | Path, model: nn.Module | None = None) -> Path:
    """Write `report.html` from what a run folder holds; returns its path.

    The network is built again by its name for the picture of the plan, unless `model` gives it; where that cannot be
    done, the page goes without. Raises RunError when the folder holds no run.
    """
    folder = Path(folder)
    run, plan = read_run(folder), Plan.load(folder / PLAN)
    graph = _graph(run, plan, model)
    story = Story(
        folder=folder,
        run=run,
        plan=plan,
        views=() if graph is None else layer_views(graph, plan),
        weights=() if graph is None or not plan.arithmetic() else weights_of(graph, plan, {}),
    )
    atomic_write(folder / REPORT, page(story).encode())
    return folder / REPORT


def _graph(run: Run, plan: Plan, model: nn.Module | None) -> Graph | None:
    """The network as its run trained it; None where it cannot be built."""
    try:
        network = build(run) if model is None else model
        return trace_rewritten(network, plan, torch.zeros(1, *run.preprocess.shape))
    except EdgetuneError:
        return None
