"""The front of plans as a picture of its own: benefit over memory, and over time."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgetune.errors import RunError
from edgetune.front import Front, Point
from edgetune.record import atomic_write
from edgetune.report.figures import axes_style

INK, FAINT, RULE, OURS, CHOSEN = "#1d1c1a", "#6b6862", "#e4e1da", "#0b7a75", "#b0552f"
FORMATS = (".svg", ".png")


def check_picture(path: Path) -> None:
    """Refuse a file that is neither SVG nor PNG, before anything is computed. Raises RunError."""
    if path.suffix.lower() not in FORMATS:
        raise RunError(f"'{path}' is no picture that can be drawn: name a file that ends in {' or '.join(FORMATS)}")


def draw(front: Front, path: Path) -> None:
    """Write the picture, as SVG or PNG by the file's name. Raises RunError when it cannot be written."""
    check_picture(path)
    import matplotlib
    from matplotlib.figure import Figure

    kind = path.suffix.lower().removeprefix(".")
    with matplotlib.rc_context(axes_style(INK, FAINT, RULE)):
        figure = Figure(figsize=(9.2, 3.6))
        memory, time = figure.subplots(1, 2, sharey=True)
        chosen = front.chosen
        _curve(memory, front.by_memory, "memory_bytes", 2**20, chosen)
        _curve(time, front.by_time, "step_ms", 1, chosen)
        memory.set(title="Benefit by memory", xlabel="peak training memory, MiB", ylabel="share of all benefit, %")
        time.set(title="Benefit by time", xlabel="time of a step, ms")
        memory.set_ylim(-3, 103)
        if chosen is not None:
            memory.legend(frameon=False, labelcolor=FAINT, fontsize=10, loc="lower right")
        content = io.BytesIO()
        figure.savefig(content, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
    atomic_write(path, content.getvalue())


def _curve(axes: Any, points: Sequence[Point], cost: str, unit: float, chosen: Point | None) -> None:
    """Benefit rises in steps: between two plans, the cheaper one is what can be had."""
    axes.step([getattr(point, cost) / unit for point in points], [100 * point.benefit for point in points],
              where="post", color=OURS, marker="o", markersize=4, linewidth=2)
    if chosen is not None:
        axes.plot([getattr(chosen, cost) / unit], [100 * chosen.benefit], linestyle="", marker="D", markersize=8,
                  color=CHOSEN, label="the plan")
