"""The planner's search: a multiple-choice knapsack over the layers of a network, in bytes and in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CELLS_OF_ONE, CELLS_OF_BOTH = 2048, (256, 128)
"""Into how many cells one capacity is cut, or (bytes, ms) where both are given: one label lives in a cell."""


@dataclass(frozen=True)
class Choice:
    """One way to treat one layer: its weight (bytes), what learning it gains, and which share of the gains of the
    layers before it survives the gradient's way through it. `learns` is False where it only lets the gradient pass.

    `ms` is what it adds to a step; `first_ms` the same where it is the first that learns and passes nothing on."""

    weight_bytes: int
    gain: float
    passes: float = 1.0
    learns: bool = True
    ms: float = 0.0
    first_ms: float = 0.0


@dataclass(frozen=True)
class Labels:
    """Prefixes of the network worth keeping: exact bytes and ms, their gain, and how each came about.

    Label 0 is always the prefix in which nothing learns. `parent` is a label of the layer before, `pick` the layer's
    choice (-1: frozen), `first` whether it is the first that learns.
    """

    weight: np.ndarray
    ms: np.ndarray
    gain: np.ndarray
    parent: np.ndarray
    pick: np.ndarray
    first: np.ndarray

    def take(self, rows: np.ndarray) -> Labels:
        return Labels(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def best_choices(layers: Sequence[Sequence[Choice]], capacity_bytes: float | None, capacity_ms: float | None = None,
                 cells: tuple[int, int] | None = None) -> tuple[float, list[int | None]]:
    """The best choice of each layer under the capacities (None: no limit), and the total gain.

    `layers` run from input to output. Layers before the first that learns are frozen (None) and cost nothing; every
    layer behind it takes one of its choices. A layer's gain counts times the `passes` of all choices behind it, so a
    prefix is worth  gain + passes * (worth of the prefix before it)  at every depth.

    Solved by dynamic programming over prefixes in two dimensions, bytes and ms. A price on time instead would not
    do: gains shrink on their way and costs do not, so a prefix's best price depends on what stands behind it. Costs
    are carried exactly, so neither capacity is ever exceeded; the plane of costs is cut into cells, of which each
    keeps its best prefix, and only if none in a cheaper cell gains as much. With cells as fine as the costs' own
    units the answer is the optimum. Under a time limit it is never worse than solving for bytes alone and then
    freezing layers from the input on until the time is met: that is tried too, and the better one is the answer.
    """
    room = (math.inf if capacity_bytes is None else capacity_bytes, math.inf if capacity_ms is None else capacity_ms)
    gain, picked = _search(layers, room, cells or _cells(room))
    if math.isfinite(room[1]):
        _, unhurried = _search(layers, (room[0], math.inf), _cells((room[0], math.inf)))
        gain, picked = max((gain, picked), _frozen_in_time(layers, unhurried, room[1]), key=lambda found: found[0])
    return gain, picked


def total_of(layers: Sequence[Sequence[Choice]], picked: Sequence[int | None]) -> Choice:
    """The gain, bytes and ms of a whole choice."""
    gain, weight, ms, deep = 0.0, 0, 0.0, False
    for choices, pick in zip(layers, picked, strict=True):
        if pick is not None:
            choice = choices[pick]
            gain = choice.gain + choice.passes * gain
            weight += choice.weight_bytes
            ms += choice.ms if deep else choice.first_ms
            deep = True
    return Choice(weight, gain, learns=deep, ms=ms)


def _cells(room: tuple[float, float]) -> tuple[int, int]:
    if all(map(math.isfinite, room)):
        return CELLS_OF_BOTH
    return (CELLS_OF_ONE, 1) if math.isfinite(room[0]) else (1, CELLS_OF_ONE)


def _search(layers: Sequence[Sequence[Choice]], room: tuple[float, float],
            cells: tuple[int, int]) -> tuple[float, list[int | None]]:
    labels, steps = _nothing(1), list[Labels]()
    for choices in layers:
        labels = _thinned(_grown(labels, _worth_trying(choices, room), room), room, cells)
        steps.append(labels)
    at = int(labels.gain.argmax())
    gain, picked = float(labels.gain[at]), list[int | None]([None] * len(layers))
    for depth in range(len(layers) - 1, -1, -1):
        step = steps[depth]
        if step.pick[at] < 0:
            break
        picked[depth] = int(step.pick[at])
        if step.first[at]:
            break
        at = int(step.parent[at])
    return gain, picked


def _nothing(count: int) -> Labels:
    zeros, whole = np.zeros(count), np.zeros(count, dtype=np.int64)
    return Labels(zeros, zeros, zeros, whole, whole - 1, np.zeros(count, dtype=bool))


def _worth_trying(choices: Sequence[Choice], room: tuple[float, float]) -> dict[int, Choice]:
    """The choices, by index, without those to which another is never inferior, by what is limited."""
    taken: dict[int, Choice] = {}
    for index, one in sorted(enumerate(choices), key=lambda item: (-item[1].gain, -item[1].passes, item[0])):
        if not any(_serves_for(other, one, room) for other in taken.values()):
            taken[index] = one
    return dict(sorted(taken.items()))


def _serves_for(other: Choice, one: Choice, room: tuple[float, float]) -> bool:
    light = other.weight_bytes <= one.weight_bytes or math.isinf(room[0])
    quick = (other.ms <= one.ms and other.first_ms <= one.first_ms) or math.isinf(room[1])
    return light and quick and other.gain >= one.gain and other.passes >= one.passes and other.learns >= one.learns


def _grown(labels: Labels, choices: Mapping[int, Choice], room: tuple[float, float]) -> Labels:
    """Every label with every choice behind it, every choice as the first that learns, and nothing; if it fits."""
    parts = [_nothing(1)]
    behind = np.arange(1, len(labels.gain))
    for index, choice in choices.items():
        rows = np.concatenate([[0], behind]) if choice.learns else behind
        first = rows == 0
        gain = choice.gain + choice.passes * labels.gain[rows]  # label 0 has no gain to pass
        parts.append(Labels(labels.weight[rows] + choice.weight_bytes,
                            labels.ms[rows] + np.where(first, choice.first_ms, choice.ms), gain, rows,
                            np.full(len(rows), index), first))
    grown = Labels(*(np.concatenate([getattr(part, name) for part in parts]) for name in
                     labels.__dataclass_fields__))
    fits = (grown.weight <= room[0]) & (grown.ms <= room[1])
    fits[0] = True
    return grown.take(np.flatnonzero(fits))


def _thinned(labels: Labels, room: tuple[float, float], cells: tuple[int, int]) -> Labels:
    """Label 0, and of every cell the label that gains most, where no cheaper cell has one that gains as much."""
    rows, columns = (np.minimum(cost // max(size / count, 1.0 if whole else 1e-12), count - 1).astype(np.int64)
                     if math.isfinite(size) else np.zeros(len(cost), dtype=np.int64)
                     for cost, size, count, whole in zip((labels.weight, labels.ms), room, cells, (True, False)))
    cell = rows * cells[1] + columns
    best = np.zeros(cells[0] * cells[1])  # a label that gains nothing is no better than label 0
    np.maximum.at(best, cell, labels.gain)
    grid = best.reshape(cells)
    reach = np.maximum.accumulate(np.maximum.accumulate(grid, 0), 1)
    cheaper = np.zeros(cells)
    cheaper[1:] = reach[:-1]
    cheaper[:, 1:] = np.maximum(cheaper[:, 1:], reach[:, :-1])
    good = np.flatnonzero((labels.gain == best[cell]) & (labels.gain > cheaper.ravel()[cell]))
    _, one = np.unique(cell[good], return_index=True)
    return labels.take(np.concatenate([[0], good[one]]))


def _frozen_in_time(layers: Sequence[Sequence[Choice]], picked: list[int | None],
                    capacity_ms: float) -> tuple[float, list[int | None]]:
    """The best of what remains of a choice when layers are frozen from the input on, and the time is met."""
    best: tuple[float, list[int | None]] = (0.0, [None] * len(layers))
    for depth, pick in enumerate(picked):
        if pick is None or not layers[depth][pick].learns:
            continue
        left = [None] * depth + picked[depth:]
        total = total_of(layers, left)
        if total.ms <= capacity_ms and total.gain > best[0]:
            best = (total.gain, left)
    return best
