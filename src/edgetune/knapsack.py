"""The planner's exact search: a multiple-choice knapsack over the layers of a network, for every depth at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """One way to treat one layer: its weight (bytes), what learning it gains, and which share of the gains of the
    layers before it survives the gradient's way through it. `learns` is False where it only lets the gradient pass."""

    weight_bytes: int
    gain: float
    passes: float = 1.0
    learns: bool = True


def best_choices(layers: list[list[Choice]], capacity_bytes: int,
                 buckets: int = 2048) -> tuple[float, list[int | None]]:
    """The best choice of each layer under the capacity, and the total gain.

    `layers` run from input to output. Layers before the first that learns are frozen (None) and weigh nothing; every
    layer behind it takes one of its choices. A layer's gain counts times the `passes` of all choices behind it, so

        best[l](b) = max over choices of  gain + passes * best[l - 1](b - weight)

    is solved exactly by dynamic programming from the input on; every depth is in it. Weights are rounded up to a
    bucket, so the capacity is never exceeded.
    """
    unit = max(capacity_bytes / buckets, 1.0)
    room = int(capacity_bytes // unit) if capacity_bytes > 0 else 0
    best = np.zeros(room + 1)  # best[b]: of the layers so far, using at most b units; nothing learns to begin with
    deep = np.zeros(room + 1, dtype=bool)  # whether something learns in it
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for choices in layers:
        # rows: stay frozen as all before; then each choice as the first that learns, and behind one that does
        table = np.full((1 + 2 * len(choices), room + 1), -np.inf)
        for index, choice in enumerate(choices):
            units = _units(choice, unit)
            if units > room:
                continue
            if choice.learns:
                table[1 + 2 * index, units:] = choice.gain
            behind = np.where(deep, choice.gain + choice.passes * best, -np.inf)
            table[2 + 2 * index, units:] = behind[:room + 1 - units]
        table[0] = 0.0  # giving up all that learned before is allowed too
        pick = table.argmax(0)
        steps.append((pick, deep))
        best, deep = table.max(0), pick > 0
    return float(best[room]), _walk_back(layers, steps, room, unit)


def _walk_back(layers: list[list[Choice]], steps: list[tuple[np.ndarray, np.ndarray]], room: int,
               unit: float) -> list[int | None]:
    chosen: list[int | None] = [None] * len(layers)
    for depth in range(len(layers) - 1, -1, -1):
        pick = int(steps[depth][0][room])
        if pick == 0:
            break
        chosen[depth] = (pick - 1) // 2
        if pick % 2:
            break  # the first that learns
        room -= _units(layers[depth][chosen[depth] or 0], unit)
    return chosen


def _units(choice: Choice, unit: float) -> int:
    return int(np.ceil(choice.weight_bytes / unit))
