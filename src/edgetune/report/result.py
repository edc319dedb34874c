"""The table at the end: accuracy, memory and time of the plan beside plain back-propagation, predicted and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgetune.cache import CacheUse
from edgetune.costs import Costs
from edgetune.frozen import FrozenPart
from edgetune.profile import Cost
from edgetune.run import PackedFile, Run
from edgetune.units import format_bytes, format_ms

COLUMNS = ("", "this plan", "plain", "plain / plan")
NONE = "-"


@dataclass(frozen=True)
class Line:
    """One line of the result: what it is, and its value by the plan, by plain back-propagation, and their ratio."""

    what: str
    planned: str
    plain: str = NONE
    ratio: str = NONE

    @property
    def cells(self) -> tuple[str, str, str, str]:
        return (self.what, self.planned, self.plain, self.ratio)


def percent(share: float | None) -> str:
    """A share as `93.4 %`, or a dash."""
    return NONE if share is None else f"{100 * share:.1f} %"


def result_lines(run: Run) -> list[Line]:
    """Everything that is known of a run, the accuracies first."""
    lines = [
        Line("accuracy before", percent(run.accuracy_before), percent(run.accuracy_before if run.plain else None)),
        Line("accuracy after", percent(run.accuracy_after), plain_accuracy(run)),
    ]
    lines += [] if run.costs is None else cost_lines(run.costs)
    lines += [] if run.frozen is None else [frozen_line(run.frozen)]
    lines += [] if run.packed is None else packed_lines(run.packed)
    return lines if run.cached is None else [*lines, *cache_lines(run.cached)]


def frozen_line(part: FrozenPart) -> Line:
    """What the frozen part takes in integers, and what it took."""
    sizes = f"{format_bytes(part.integer_bytes)} for {format_bytes(part.float_bytes)}"
    return Line("frozen part in int8", f"{sizes}, up to {part.layer}")


def packed_lines(packed: PackedFile) -> list[Line]:
    """What the packed network takes as a file, and what it knows."""
    return [Line("accuracy, packed", percent(packed.accuracy)),
            Line("packed file", format_bytes(packed.file_bytes))]


def cache_lines(use: CacheUse) -> list[Line]:
    """What was kept of the frozen part, and how often it was found."""
    kept = f"{format_bytes(use.stored_bytes)}, {use.stored} samples"
    return [
        Line("frozen part, kept", f"{kept} behind {', '.join(use.layers)}"),
        Line("pictures found in the cache", percent(use.hit_rate)),
    ]


def plain_accuracy(run: Run) -> str:
    """Accuracy after plain back-propagation, or why there is none."""
    if run.plain is not None and run.plain.diverged:
        return "diverged"
    return percent(run.plain.accuracy if run.plain is not None else None)


def cost_lines(costs: Costs) -> list[Line]:
    """Budgets, memory and time, predicted and measured."""
    lines = []
    if costs.memory_budget_bytes is not None:
        lines.append(Line("memory budget", format_bytes(costs.memory_budget_bytes)))
    if costs.step_budget_ms is not None:
        lines.append(Line("time budget", format_ms(costs.step_budget_ms)))
    lines.append(Line("pictures at a time", *2 * (f"{costs.micro_batch} of {costs.batch_size}",)))
    for what, field, write in (
        ("peak training memory", "peak_bytes", format_bytes),
        ("kept for backward", "kept_bytes", format_bytes),
        ("step time", "step_ms", format_ms),
    ):
        for how, planned, plain in (
            ("predicted", costs.planned_predicted, costs.plain_predicted),
            ("measured", costs.planned_measured, costs.plain_measured),
        ):
            line = _cost_line(f"{what}, {how}", field, write, planned, plain)
            if line is not None:
                lines.append(line)
    return lines


def _cost_line(
    what: str, field: str, write: Callable[[float], str], planned: Cost | None, plain: Cost | None
) -> Line | None:
    ours = None if planned is None else getattr(planned, field)
    theirs = None if plain is None else getattr(plain, field)
    if ours is None:
        return None
    if theirs is None:
        return Line(what, write(ours))
    return Line(what, write(ours), write(theirs), f"{theirs / ours:.1f}x" if ours else NONE)
