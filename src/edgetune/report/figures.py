"""Figures as SVG that can stand in a page: text stays text, and colours are the page's own, light or dark.

matplotlib draws with stand-in colours, which are then replaced by the page's CSS variables.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

STAND_INS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--rule)",
    "#040404": "var(--ours)",
    "#050505": "var(--plain)",
    "#060606": "var(--plain-soft)",
}
INK, FAINT, RULE, OURS, PLAIN, PLAIN_SOFT = STAND_INS


def axes_style(ink: str, faint: str, rule: str) -> dict[str, Any]:
    """What all pictures have in common, as settings of matplotlib, in these colours."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "edgetune",
        "font.size": 11,
        "text.color": ink,
        "axes.edgecolor": rule,
        "axes.labelcolor": faint,
        "xtick.color": rule,
        "ytick.color": rule,
        "xtick.labelcolor": faint,
        "ytick.labelcolor": faint,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": rule,
        "axes.axisbelow": True,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "figure.constrained_layout.use": True,
    }


_STYLE = {
    **axes_style(INK, FAINT, RULE),
    "axes.spines.left": False,
    "axes.grid.axis": "y",
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
    "axes.titlepad": 10,
}


def curves(
    title: str, ours: Sequence[float], plain: Sequence[float], *, percent: bool = False, start: float | None = None
) -> str:
    """One number a pass over the data, of the plan and of plain back-propagation; `start` is its value before."""
    first = 0 if start is not None else 1
    lead = [start] if start is not None else []

    def draw(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        for values, colour, name, style in (
            (plain, PLAIN, "plain back-propagation", (0, (4, 2))),
            (ours, OURS, "this plan", "-"),
        ):
            if values:
                axes.plot(
                    range(first, len(values) + 1),
                    [*lead, *values],
                    color=colour,
                    label=name,
                    linestyle=style,
                    marker="o" if len(values) < 3 else "",
                )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.legend(frameon=False, labelcolor=FAINT, fontsize=10.5)

    return _svg(draw, 4.6, 3.1, title)


def memory_by_layer(
    numbers: Sequence[str], ours: Sequence[int], plain: Sequence[int], measured: Sequence[int] | None
) -> str:
    """Bytes kept for backward by each layer, in order: plain wide behind, the plan in front, measurements as dots."""
    title = "Bytes kept for backward, by layer"
    scale, unit = (2**20, "MiB") if max([*plain, *ours, 0]) >= 2**20 else (2**10, "KiB")

    def draw(axes: Any) -> None:
        places = range(len(numbers))
        axes.bar(places, [value / scale for value in plain], width=0.84, color=PLAIN_SOFT, label="plain, predicted")
        axes.bar(places, [value / scale for value in ours], width=0.84, color=OURS, label="this plan, predicted")
        if measured is not None:
            axes.plot(
                places,
                [value / scale for value in measured],
                linestyle="",
                marker="D",
                markersize=3.2,
                color=INK,
                label="this plan, measured",
            )
        every = max(1, -(-len(numbers) // 24))
        axes.set_xticks(list(places)[::every], list(numbers)[::every])
        axes.set_xlim(-0.7, len(numbers) - 0.3)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, labelcolor=FAINT, fontsize=10.5, loc="upper right")

    return _svg(draw, 9.2, 3.0, title)


def _svg(draw: Any, width: float, height: float, label: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height))
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _at_home(text.getvalue(), label)


def _at_home(svg: str, label: str) -> str:
    """Take off what only a file of its own needs, and dress the rest in the page's fonts and colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would reach the whole page
    svg = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = re.sub("|".join(STAND_INS), lambda found: STAND_INS[found[0]], svg)
    svg = re.sub(r'(<svg [^>]*?) (?:height|width)="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg [^>]*?) (?:height|width)="[^"]*"', r"\1", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1).strip()
