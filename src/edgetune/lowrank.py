"""Ranks for ASI under a budget of kept bytes: of each layer's candidates one, so that the errors add up to the least.

A candidate is the decomposition of a layer's input at one share of its energy, or the input whole. One batch tells its
bytes and its error, the Frobenius norm of what its weight gradient lacks. The choice is exact, by the fronts of
`edgetune.sparse.select`. Error and choice by layer are those of Nguyen, Quelennec, Tartaglione and Nguyen (ICML 2025).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgetune.alone import Reference, Tape
from edgetune.contract import Plan, Segment
from edgetune.draft import last_layers
from edgetune.errors import BudgetError, PlanError
from edgetune.graph import Graph, trace
from edgetune.hosts.conv import geometry_at
from edgetune.hosts.tucker import Ranks, truncated_hosvd
from edgetune.hosts.tucker_gradient import factored_weight_gradient
from edgetune.methods.backward.asi import ASI
from edgetune.methods.backward.exact import Exact
from edgetune.sparse.select import Front, extended
from edgetune.units import format_bytes

ENERGIES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Shares of energy at which candidates are made: the published ones, and three more, as the mean of a map alone often
holds 0.9 of it and little of the gradient."""


@dataclass(frozen=True)
class Candidate:
    """Ranks of one layer, the bytes that ASI keeps with them, and the norm of the error of its weight gradient."""

    ranks: Ranks
    kept_bytes: int
    error: float


def rank_candidates(model: nn.Module, graph: Graph, batch: tuple[torch.Tensor, torch.Tensor], layers: Sequence[str],
                    energies: Sequence[float] = ENERGIES) -> dict[str, list[Candidate]]:
    """The candidates of each of `layers`, from one pass of the batch x (n c h w), y (n) through a copy of the model.

    Raises PlanError for layers that are no convolutions which can be followed.
    """
    x, y = batch
    reference = Reference(model, graph)
    alone = reference.alone({name: (Exact(),) for name in layers})
    missing = [name for name in layers if name not in alone]
    if missing:
        raise PlanError(f"layer '{missing[0]}' is no convolution whose input can be looked at: leave it out, or give "
                        "it ranks by hand")
    exact, tape = reference.run(x, y, len(x), [alone])
    return {name: [*(_candidate(own.segments, tape, exact[name], energy) for energy in energies),
                   _whole(own.segments, tape)] for name, own in alone.items()}


@torch.no_grad()
def _candidate(segments: Sequence[Segment], tape: Tape, exact: torch.Tensor, energy: float) -> Candidate:
    """A layer called more than once has the ranks that its largest call asks for, and errors that add up."""
    calls = [(segment.calls[0], tape.values[segment.inputs[0]], tape.gradients[segment.outputs[0]])
             for segment in segments]
    found = [truncated_hosvd(x, energy) for _, x, _ in calls]
    gradient = torch.zeros_like(exact)
    for (call, x, gy), factors in zip(calls, found, strict=True):
        gradient += factored_weight_gradient(factors, gy, geometry_at(call, x))
    n, c, h, w = (max(factors.core.shape[axis] for factors in found) for axis in range(4))
    return _of((n, c, h, w), [x for _, x, _ in calls], float((gradient - exact).norm()))


def _whole(segments: Sequence[Segment], tape: Tape) -> Candidate:
    inputs = [tape.values[segment.inputs[0]] for segment in segments]
    n, c, h, w = (max(x.shape[axis] for x in inputs) for axis in range(4))
    return _of((n, c, h, w), inputs, 0.0)


def _of(ranks: Ranks, inputs: Sequence[torch.Tensor], error: float) -> Candidate:
    method = ASI(ranks=ranks)
    return Candidate(ranks, sum(method.numbers(x.shape) * x.element_size() for x in inputs), error)


def least_error(candidates: Sequence[Sequence[Candidate]], kept_bytes: int) -> list[int] | None:
    """Which candidate each layer takes: together at most `kept_bytes`, and the least error; None where nothing fits."""
    fronts = [Front(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int32), np.zeros(1, np.int16))]
    for layer in candidates:
        fronts.append(extended(fronts[-1], [(each.kept_bytes, -each.error) for each in layer], kept_bytes))
        if not len(fronts[-1].size):
            return None
    taken, row = list[int](), len(fronts[-1].size) - 1
    for front in reversed(fronts[1:]):
        taken.append(int(front.choice[row]))
        row = int(front.origin[row])
    return taken[::-1]


def choose_ranks(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], kept_bytes: int, *,
                 last: int | None = None, energies: Sequence[float] = ENERGIES, scales: bool = False,
                 graph: Graph | None = None) -> Plan:
    """The plan in which the last `last` convolutions (None: all) learn by ASI and keep at most `kept_bytes` together.

    `batch` x (n c h w), y (n) is as large as those of training; its ranks go by that. Norms and linear layers learn
    as in `last_layers`, and what they keep is not counted. The model stays as it is. Raises BudgetError, with the
    smallest budget that works, when no ranks fit, and PlanError as `rank_candidates` does.
    """
    graph = graph or trace(model, batch[0])
    plan = last_layers(graph, last, ASI(), scales=scales)
    candidates = rank_candidates(model, graph, batch, list(plan.layers), energies)
    taken = least_error(list(candidates.values()), kept_bytes)
    if taken is None:
        smallest = sum(min(each.kept_bytes for each in layer) for layer in candidates.values())
        raise BudgetError(f"{format_bytes(kept_bytes)} is too little for the inputs of {len(candidates)} convolutions: "
                          f"the smallest budget that works here is {format_bytes(smallest)} ({smallest} bytes); allow "
                          "that, let fewer layers learn, or add smaller `energies`")
    return plan.model_copy(update={"layers": _with_ranks(candidates, taken)})


def _with_ranks(candidates: Mapping[str, Sequence[Candidate]], taken: Sequence[int]) -> dict[str, tuple[ASI]]:
    return {name: (ASI(ranks=layer[at].ranks),) for (name, layer), at in zip(candidates.items(), taken, strict=True)}
