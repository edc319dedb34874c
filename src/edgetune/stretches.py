"""Which stretches of a network run again in backward (see `edgetune.methods.backward.checkpoint`).

Stretches begin right in front of convolutions and linear layers. One step, watched on meta tensors, tells for each
stretch what it holds while it goes backward, and what of it stays for the time before: only what later layers read if
it runs again, all that its layers keep if not. So the peak is the largest over stretches of what those in front leave
there and what the stretch itself needs, and the least of it is found exactly, by dynamic programming over the borders.
The step that really runs is then predicted, and has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgetune.contract import Plan
from edgetune.cuts import Chosen, StretchCosts
from edgetune.errors import BudgetError
from edgetune.graph import Graph, trace
from edgetune.methods.backward.checkpoint import BORDERS, Checkpoint
from edgetune.profile import predicted_peak
from edgetune.timeline import timeline
from edgetune.units import format_bytes

NEAR = 0.02
"""Of peaks that differ by no more than this share, the one that computes least again is taken."""
SLACKS = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08)
"""By how much candidates may exceed the least peak that the watched step allows."""
ROUNDS = 6
"""How often what is aimed at is put right by what a step is predicted to hold."""


def checkpointed(model: nn.Module, sample: torch.Tensor, plan: Plan, *, memory_bytes: int | None = None,
                 optimizer_copies: int = 1, graph: Graph | None = None) -> Plan:
    """`plan` with stretches that run again in backward, for batches like `sample` x (n c h w).

    Without `memory_bytes` the predicted peak is the lowest that is found; with it at most that, and as little as
    possible is computed again (products, and what is written): nothing where the plan fits as it is. What learns, and
    by which methods, stays. Raises BudgetError, with the smallest budget that works, where the lowest peak is more.
    """
    search = _Search(model, sample, plan, graph or trace(model, sample), optimizer_copies)
    if memory_bytes is None:
        return search.lowest().plan
    plain = search.tried(())
    return plain.plan if plain.peak_bytes <= memory_bytes else search.cheapest(memory_bytes).plan


def sqrt_stretches(graph: Graph, plan: Plan) -> Plan:
    """The textbook's choice: the L convolutions and linear layers of the gradient's path in about sqrt(L) stretches of
    equal numbers of layers, all of which run again but the last."""
    learned = plan.learned()
    borders = [call.name for call in graph.layers(*BORDERS)]
    first = next((at for at, call in enumerate(graph.layers(*BORDERS)) if learned & set(call.params.values())), 0)
    parts = np.array_split(np.array(borders[first:]), max(round(math.sqrt(len(borders) - first)), 1))
    return _with_stretches(plan, [[str(name) for name in part] for part in parts[:-1]])


def _with_stretches(plan: Plan, stretches: Sequence[Sequence[str]]) -> Plan:
    layers = dict(plan.layers)
    for number, names in enumerate(stretches):
        for name in dict.fromkeys(names):
            layers[name] = (*layers.get(name, ()), Checkpoint(stretch=number))
    return plan.model_copy(update={"layers": layers})


@dataclass(frozen=True)
class _Tried:
    """A plan with stretches, the peak that was predicted for it, and what it computes again."""

    plan: Plan
    peak_bytes: int
    work: int


class _Search:
    """Candidates from the watched step, each predicted once."""

    def __init__(self, model: nn.Module, sample: torch.Tensor, plan: Plan, graph: Graph, optimizer_copies: int) -> None:
        self.model, self.sample, self.plan, self.graph = model, sample, plan, graph
        self.optimizer_copies = optimizer_copies
        watched = timeline(model, sample, plan, graph)
        self.costs = None if watched is None else StretchCosts.of(model, plan, watched)
        self._tried: dict[Chosen, _Tried] = {}

    def tried(self, chosen: Chosen) -> _Tried:
        """The plan with these stretches, and what it is predicted to hold."""
        if chosen not in self._tried:
            costs, made = self.costs, self.plan
            if costs is not None:
                made = _with_stretches(self.plan, [costs.layers(start, end) for start, end in chosen])
            peak = predicted_peak(self.model, self.sample, made, self.graph, optimizer_copies=self.optimizer_copies)
            work = sum(costs.work(start, end) for start, end in chosen) if costs is not None else 0
            self._tried[chosen] = _Tried(made, peak, work)
        return self._tried[chosen]

    def lowest(self) -> _Tried:
        """The lowest peak that is found, give or take `NEAR`."""
        candidates = [self.tried(())]
        if self.costs is not None:
            least = self.costs.least_peak()
            candidates += [self.tried(chosen) for slack in SLACKS
                           if (chosen := self.costs.least_work(int(least * (1 + slack)))) is not None]
        bound = (1 + NEAR) * min(each.peak_bytes for each in candidates)
        return min((each for each in candidates if each.peak_bytes <= bound), key=lambda each: each.work)

    def cheapest(self, memory_bytes: int) -> _Tried:
        """The least computed again within the memory. Raises BudgetError where nothing fits."""
        self.lowest()
        if self.costs is not None:
            rest = self.tried(()).peak_bytes - self.costs.peak_bytes
            aim = memory_bytes - rest
            for _ in range(ROUNDS):
                chosen = self.costs.least_work(aim)
                if chosen is None:
                    break
                spare = memory_bytes - self.tried(chosen).peak_bytes
                if 0 <= spare < NEAR * memory_bytes / 2:
                    break
                aim += spare if spare < 0 else spare // 2
        fitting = [each for each in self._tried.values() if each.peak_bytes <= memory_bytes]
        if not fitting:
            smallest = min(each.peak_bytes for each in self._tried.values())
            raise BudgetError(f"{format_bytes(memory_bytes)} is too little even with all that can be computed again: "
                              f"the smallest budget that works here is {format_bytes(smallest)} ({smallest} bytes); "
                              "allow that, let fewer layers learn, or take smaller micro-batches")
        return min(fitting, key=lambda each: (each.work, each.peak_bytes))
