"""Planner -> Front: what can be had for which memory and which time, over a range of budgets."""

from __future__ import annotations

from edgetune.errors import BudgetError
from edgetune.plan import MARGIN, Budget, Planner
from edgetune.prospect import Found
from edgetune.record import Record

POINTS = 10
"""Budgets that are tried in memory, and again in time."""


class Point(Record):
    """One plan by prediction: `benefit` is the share of what learning everything exactly would gain, `learning` how
    many convolutions learn; memory and time are of a whole step."""

    memory_bytes: int
    step_ms: float
    benefit: float
    learning: int
    micro_batch: int


class Front(Record):
    """Plans of which none is beaten: `by_memory` whatever time they take, `by_time` within the memory of the budget;
    both rising. `chosen` is the plan that was made."""

    by_memory: tuple[Point, ...]
    by_time: tuple[Point, ...]
    chosen: Point | None


def front(planner: Planner, budget: Budget, chosen: Found | None = None, points: int = POINTS) -> Front:
    """Plan for `points` memory budgets, from the head alone to everything exact in the smallest parts, and for as many
    times.

    The times keep within `budget.memory_bytes` where that is given. Layers are timed, but no plan is tried by a real
    step.
    """
    prospect = planner.prospect
    exact = prospect.solve(None, None, planner.batch, timed=True)
    least, most = (prospect.predicted_peak(made, 1) for made in (prospect.head, exact.made))
    by_memory = []
    for share in _shares(points):
        memory = int(least ** (1 - share) * most ** share / MARGIN) + 1
        try:
            micro, _ = planner.micro_batch(Budget(memory_bytes=memory))
        except BudgetError:
            continue
        by_memory.append(point(planner, planner.fill(int(memory * MARGIN), None, micro, timed=True)))
    micro, _ = planner.micro_batch(Budget(memory_bytes=budget.memory_bytes))
    allowed = None if budget.memory_bytes is None else int(budget.memory_bytes * MARGIN)
    by_time = [point(planner, planner.fill(allowed, share ** 2 * exact.total.ms, micro)) for share in _shares(points)]
    made = None if chosen is None else point(planner, prospect.timed(chosen))
    own = [] if made is None else [made]
    return Front(by_memory=_unbeaten([*by_memory, *own], "memory_bytes"),
                 by_time=_unbeaten([*by_time, *own], "step_ms"), chosen=made)


def point(planner: Planner, found: Found) -> Point:
    """What a choice that was timed costs and gains."""
    prospect, micro = planner.prospect, found.made.micro_batch or planner.batch
    learning = sum(pick is not None and options[pick].learns
                   for options, pick in zip(prospect.options, found.picked, strict=True))
    return Point(memory_bytes=prospect.predicted_peak(found.made, micro),
                 step_ms=planner.head_ms(micro) + found.total.ms,
                 benefit=found.total.gain / (prospect.most_gain or 1.0), learning=learning, micro_batch=micro)


def _shares(points: int) -> list[float]:
    return [number / max(points - 1, 1) for number in range(points)]


def _unbeaten(points: list[Point], cost: str) -> tuple[Point, ...]:
    """Those that gain more than every cheaper one."""
    kept: list[Point] = []
    for one in sorted(points, key=lambda point: (getattr(point, cost), -point.benefit)):
        if not kept or one.benefit > kept[-1].benefit:
            kept.append(one)
    return tuple(kept)
