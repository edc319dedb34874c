"""What stretches between borders hold, leave and compute again, from one watched step; the best choices of them.

The peak of a choice is the largest over its stretches of what those in front leave there and what the stretch itself
needs. Ways from border to border, none of which is worse than another in what it leaves and in what it computes again,
are carried to the end: the choice is exact for the numbers of the watched step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import nn

from edgetune.contract import KeptMethod, Plan
from edgetune.graph import Call, carries_hooks
from edgetune.methods.backward.checkpoint import BORDERS, Checkpoint
from edgetune.timeline import Moment, Timeline

MOST_BORDERS = 60
"""Of more borders those that little crosses are tried."""
WRITTEN_MACS = 16
"""Writing a number of a map takes a CPU about as long as so many multiply-accumulates: else norms, activations and
depthwise convolutions would count for nothing."""

Chosen = tuple[tuple[int, int], ...]
"""Stretches that run again: from which border up to which, by their numbers."""


@dataclass(frozen=True)
class _State:
    """A way up to a border: what it leaves there, what it computes again, and where it came from."""

    front: int
    work: int
    before: _State | None = None
    again: bool = False
    border: int = 0


class StretchCosts:
    """What a stretch between two borders takes, from the timeline of a step in which nothing runs again.

    `borders` are indices of calls; stretch (a, b) lies between the borders number a and b. The last one is the end.
    """

    def __init__(self, watched: Timeline, borders: Sequence[int], barred: frozenset[int]) -> None:
        self.watched, self.calls = watched, watched.graph.calls
        self.borders = (*borders, len(self.calls) + 1)
        self.barred = barred
        self.peak_bytes = watched.peak_bytes

    @classmethod
    def of(cls, model: nn.Module, plan: Plan, watched: Timeline) -> StretchCosts:
        """The costs of the borders at which the plan may be cut."""
        borders = list(_borders(watched, plan))
        crossing = [sum(v.size for v in watched.values if v.made < at <= v.read) for at in borders]
        if len(borders) > MOST_BORDERS:
            groups = np.array_split(np.arange(len(borders)), MOST_BORDERS)
            borders = [borders[min(group, key=lambda i: crossing[i])] for group in groups]
        return cls(watched, borders, frozenset(_barred(model, plan, watched)))

    def layers(self, start: int, end: int) -> list[str]:
        """The layers that a plan names to make this stretch."""
        return [call.name for call in self._between(start, end) if call.kind in BORDERS]

    def work(self, start: int, end: int) -> int:
        """What the stretch computes when it runs again, in multiply-accumulates."""
        return sum(call.macs + WRITTEN_MACS * math.prod(call.out_shape) for call in self._between(start, end)
                   if call.out_shape)

    def _between(self, start: int, end: int) -> Sequence[Call]:
        return self.calls[self.borders[start]:self.borders[end]]

    def least_peak(self) -> int:
        """The lowest peak at which there is a choice, to a thousandth."""
        low, high = 0, self.peak_bytes
        while high - low > high / 1000:
            middle = (low + high) // 2
            if self._ways(middle, one=True):
                high = middle
            else:
                low = middle
        return high

    def least_work(self, peak_bytes: int) -> Chosen | None:
        """The choice that computes least again of those with at most this peak; None where there is none."""
        ways = self._ways(peak_bytes, one=False)
        if not ways:
            return None
        state: _State | None = min(ways, key=lambda state: state.work)
        chosen = list[tuple[int, int]]()
        while state is not None and state.before is not None:
            if state.again:
                chosen.append((state.before.border, state.border))
            state = state.before
        return tuple(reversed(chosen))

    def _ways(self, peak_bytes: int, *, one: bool) -> list[_State]:
        """The ways to the end, none of which is worse than another in both numbers; of them `one`, with least left."""
        last = len(self.borders) - 1
        reached: list[list[_State]] = [[] for _ in self.borders]
        reached[0] = [_State(self._entry, 0)]
        for start in range(last):
            reached[start] = _undominated(reached[start])[:1 if one else None]
            for state in reached[start]:
                spare = peak_bytes - state.front
                if self._held[start] <= spare:
                    reached[start + 1].append(_State(state.front + self._left[start], state.work, state, False,
                                                     start + 1))
                for end in range(start + 1, last + 1):
                    needed = self._again[start].get(end)
                    if needed is None:
                        break
                    if needed[0] > spare:
                        continue  # a longer one may need less: fewer gradients are there when its turn comes
                    reached[end].append(_State(state.front + needed[1], state.work + needed[2], state, True, end))
        return _undominated(reached[last])

    @cached_property
    def _entry(self) -> int:
        """What is there in front of the first border."""
        first = self.borders[0]
        return sum(v.size for v in self.watched.values if v.made < first and (v.kept is not None or v.read >= first))

    @cached_property
    def _held(self) -> list[int]:
        """What each stretch needs beside what is in front of it, if it has kept all and does not run again."""
        return [max(self._backward(start, start + 1), self._forward(start, start + 1))
                for start in range(len(self.borders) - 1)]

    @cached_property
    def _left(self) -> list[int]:
        """What each stretch leaves there if it does not run again."""
        return [sum(v.size for v in self.watched.values if low <= v.made < high
                    and (v.kept is not None or v.read >= high))
                for low, high in itertools.pairwise(self.borders)]

    @cached_property
    def _again(self) -> list[dict[int, tuple[int, int, int]]]:
        """For every stretch that may run again: what it needs then, what it leaves before, what it computes."""
        table: list[dict[int, tuple[int, int, int]]] = [{} for _ in self.borders]
        for start in range(len(self.borders) - 1):
            for end in range(start + 1, len(self.borders)):
                low, high = self.borders[start], self.borders[end]
                if any(low <= at < high for at in self.barred):
                    break
                needed = max(self._backward(start, end), self._flow(end) + self._forward(start, end))
                left = sum(v.size for v in self.watched.values if low <= v.made < high <= v.read)
                table[start][end] = (needed, left, self.work(start, end))
        return table

    def _forward(self, start: int, end: int) -> int:
        """What the stretch adds while it runs forward and keeps all."""
        moments = list(self._moments(self.watched.forward, start, end))
        return max((m.peak for _, m in moments), default=0) - (moments[0][1].start if moments else 0)

    def _backward(self, start: int, end: int) -> int:
        """What is there while the stretch goes backward, but for what was there in front of it."""
        return max((m.peak - self._kept_before(self.borders[start], at)
                    for at, m in self._moments(self.watched.backward, start, end)), default=0)

    def _flow(self, end: int) -> int:
        """Gradients that are there when backward comes to the stretches in front of a border."""
        earlier = [at for at in self.watched.backward if at < self.borders[end]]
        if not earlier:
            return 0
        return self.watched.backward[max(earlier)].start - self._kept_before(len(self.calls) + 1, max(earlier))

    def _kept_before(self, border: int, at: int) -> int:
        """Bytes made in front of a border that are still kept when backward comes to call number `at`."""
        return int(self._kept[border, at])

    @cached_property
    def _kept(self) -> npt.NDArray[np.int64]:
        size = len(self.calls) + 2
        made = np.zeros((size, size), np.int64)
        for value in self.watched.values:
            if value.kept is not None:
                made[value.made + 1, value.kept] += value.size
        return made.cumsum(0).cumsum(1)

    def _moments(self, of: Mapping[int, Moment], start: int, end: int) -> Iterator[tuple[int, Moment]]:
        return ((at, of[at]) for at in range(self.borders[start], self.borders[end]) if at in of)


def _undominated(states: list[_State]) -> list[_State]:
    """Those that leave less, or compute less again, than all others; by what they leave."""
    kept = list[_State]()
    for state in sorted(states, key=lambda state: (state.front, state.work)):
        if not kept or state.work < kept[-1].work:
            kept.append(state)
    return kept


def _borders(watched: Timeline, plan: Plan) -> Iterator[int]:
    """Indices of the calls in front of which a stretch may begin or end."""
    calls, index = watched.graph.calls, {call.node: at for at, call in enumerate(watched.graph.calls)}
    apart = [[index[call.node] for call in segment.calls] for segment in watched.segments]
    named: dict[str, list[int]] = {}
    for at, call in enumerate(calls):
        if call.kind in BORDERS:
            named.setdefault(call.name, []).append(at)
        if watched.graph.overwrites_for_others(call):
            source = watched.graph[call.inputs[0]]
            apart.append([index[node] for node in (source.node, *source.consumers)])
    spans = [(min(each), max(each)) for each in (*apart, *named.values())]
    first = min(watched.backward, default=len(calls))
    for at, call in enumerate(calls):
        if call.kind in BORDERS and call.followed and at >= first and not any(low < at <= high for low, high in spans):
            yield at


def _barred(model: nn.Module, plan: Plan, watched: Timeline) -> Iterator[int]:
    """Indices of the calls that may not run again."""
    index = {call.node: at for at, call in enumerate(watched.graph.calls)}
    for segment in watched.segments:
        if segment.state:
            yield from (index[call.node] for call in segment.calls)
    modules = dict(model.named_modules())
    for at, call in enumerate(watched.graph.calls):
        hooked = call.name in modules and carries_hooks(modules[call.name])
        taken = call.kind in BORDERS and (plan.settings(call.name, KeptMethod) or Checkpoint().refuse(call))
        if hooked or taken:
            yield at
