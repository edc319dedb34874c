"""Planner, its choice -> Reasons: why each layer got what it got, and what choosing otherwise would have cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgetune.knapsack import Choice, total_of
from edgetune.plan import Planner
from edgetune.prospect import Found, Option, Picks, Prospect
from edgetune.record import Record

NUDGE = 0.05
"""Share by which a capacity is moved each way to see what the last byte or millisecond is worth."""


class Way(Record):
    """One method on one layer. `fidelity` is the share, 0 to 1, of what learning exactly would gain: the squared cosine
    of its weight gradient with the exact one, times the share of the squared exact gradient in what learns by it;
    `passes` is the share that it leaves to the layers before. Bytes and ms are what learning by it adds to a step in
    which only the head learns; `ms` is None where nothing was timed."""

    method: str
    settings: dict[str, Any]
    fidelity: float
    passes: float
    memory_bytes: int
    ms: float | None


class Otherwise(Record):
    """The best other choice for a layer, all others staying as they are, and what would change by it.

    `way` indexes the ways, None meaning frozen, as are then all layers before it. A frozen layer that learns draws
    those between it and the first that learns along. `benefit` is a share of all there is to gain.
    """

    way: int | None
    learns: bool
    benefit: float
    memory_bytes: int
    ms: float | None


class Reason(Record):
    """One layer: its `importance` as a share of all layers', its ways, one a method of the planner (None: the method
    does not take this layer), and the one chosen (None: frozen)."""

    layer: str
    importance: float
    ways: tuple[Way | None, ...]
    way: int | None
    learns: bool
    otherwise: Otherwise | None


class Reasons(Record):
    """A whole plan: `benefit` is the share of what learning everything exactly would gain; `benefit_per_byte` and
    `benefit_per_ms` are what a little more of each would add, None where that was not limited or nothing learns."""

    layers: tuple[Reason, ...]
    benefit: float
    benefit_per_byte: float | None
    benefit_per_ms: float | None


def explain(planner: Planner, found: Found, *, bytes_limited: bool, ms_limited: bool) -> Reasons:
    """Why `found` is what it is. Layers have times where the time was limited."""
    prospect, micro = planner.prospect, found.made.micro_batch or planner.batch
    choices = prospect.choices(micro, timed=ms_limited)
    whole = prospect.most_gain or 1.0
    prices = _prices(planner, found, micro, bytes_limited, ms_limited)
    reasons = []
    for index, call in enumerate(prospect.convs):
        options = prospect.options[index]
        ways: list[Way | None] = [None] * len(prospect.methods)
        for option, choice in zip(options, choices[index], strict=True):
            if option.learns:
                ways[option.way] = Way(method=option.method.method, settings=option.method.model_dump(),
                                       fidelity=prospect.fidelity(option.way, index), passes=choice.passes,
                                       memory_bytes=choice.weight_bytes, ms=choice.ms if ms_limited else None)
        way, learns = _way(options, found.picked[index])
        importance = prospect.worth.importance.get(call.name, 0.0)
        reasons.append(Reason(layer=call.name or call.node, importance=importance / whole, ways=tuple(ways),
                              way=way, learns=learns, otherwise=_otherwise(prospect, choices, found.picked, index,
                                                                           prices, whole, ms_limited)))
    per_byte, per_ms = (price / whole for price in prices)
    return Reasons(layers=tuple(reasons), benefit=found.total.gain / whole,
                   benefit_per_byte=per_byte if bytes_limited and found.total.learns else None,
                   benefit_per_ms=per_ms if ms_limited and found.total.learns else None)


def _way(options: Sequence[Option], pick: int | None) -> tuple[int | None, bool]:
    return (None, False) if pick is None else (options[pick].way, options[pick].learns)


def _prices(planner: Planner, found: Found, micro: int, bytes_limited: bool,
            ms_limited: bool) -> tuple[float, float]:
    """What one more byte and one more ms would gain where the plan stands; 0 where there is no limit."""
    limits = (found.total.weight_bytes if bytes_limited else None, found.total.ms if ms_limited else None)
    prices = []
    for at, limit in enumerate(limits):
        if not limit:
            prices.append(0.0)
            continue
        gains = []
        for share in (1 - NUDGE, 1 + NUDGE):
            moved = [limit * share if i == at else other for i, other in enumerate(limits)]
            gains.append(planner.prospect.solve(moved[0], moved[1], micro).total.gain)
        prices.append(max(gains[1] - gains[0], 0.0) / (2 * NUDGE * limit))
    return prices[0], prices[1]


def _otherwise(prospect: Prospect, choices: Sequence[Sequence[Choice]], picked: Picks, index: int,
               prices: tuple[float, float], whole: float, timed: bool) -> Otherwise | None:
    """The other choice that loses least, its bytes and ms counted at their prices."""
    now, best, most = total_of(choices, picked), None, 0.0
    for other in (None, *range(len(choices[index]))):
        changed = _changed(prospect, choices, picked, index, other)
        if other == picked[index] or changed is None:
            continue
        then = total_of(choices, changed)
        gain, weight, ms = then.gain - now.gain, then.weight_bytes - now.weight_bytes, then.ms - now.ms
        worth = gain - prices[0] * weight - prices[1] * ms
        if best is None or worth > most:
            way, learns = _way(prospect.options[index], other)
            best, most = Otherwise(way=way, learns=learns, benefit=gain / whole, memory_bytes=weight,
                                   ms=ms if timed else None), worth
    return best


def _changed(prospect: Prospect, choices: Sequence[Sequence[Choice]], picked: Picks, index: int,
             other: int | None) -> Picks | None:
    """The whole choice with that of one layer changed; None where it could not be."""
    first = next((i for i, pick in enumerate(picked) if pick is not None), len(picked))
    if other is None:  # frozen, and with it all before
        behind = next((i for i in range(index + 1, len(picked))
                       if (pick := picked[i]) is not None and choices[i][pick].learns), len(picked))
        return None if index < first else [None] * behind + list(picked[behind:])
    if index <= first and not choices[index][other].learns:
        return None
    option = prospect.options[index][other]
    along = [prospect.pick_of(between, option.way, option.learns) for between in range(index + 1, first)]
    return [*picked[:index], other, *along, *picked[max(index + 1, first):]]
