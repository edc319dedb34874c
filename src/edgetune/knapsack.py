"""The planner's exact search: a multiple-choice knapsack over the layers, for every depth at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Choice:
    """One way to treat one layer: what it weighs (bytes) and what it is expected to gain. `learns` is False for a
    layer that only lets the gradient pass."""

    weight_bytes: int
    gain: float
    learns: bool = True


def best_choices(layers: list[list[Choice]], capacity_bytes: int,
                 buckets: int = 2048) -> tuple[float, list[int | None]]:
    """The best choice of each layer under the capacity, and the total gain.

    `layers` run from input to output. The first learning layer ends the gradient's way: layers before it are frozen
    (None) and weigh nothing; every layer after it must take one of its choices. Weights are rounded up to a bucket,
    so the capacity is never exceeded. Exact up to that rounding: dynamic programming from the last layer back, one
    sweep serving every depth.
    """
    unit = max(capacity_bytes / buckets, 1.0)
    room = int(capacity_bytes // unit) if capacity_bytes > 0 else -1
    best_gain, best_depth = 0.0, len(layers)
    if room < 0:
        return best_gain, [None] * len(layers)
    gains = np.zeros(room + 1)  # gains[b]: best of the layers behind, using at most b units
    picks: list[np.ndarray] = [np.zeros(0)] * len(layers)
    best_first = -1
    for depth in range(len(layers) - 1, -1, -1):
        table = np.full((len(layers[depth]), room + 1), -np.inf)
        for index, choice in enumerate(layers[depth]):
            units = int(np.ceil(choice.weight_bytes / unit))
            if units <= room:
                table[index, units:] = gains[:room + 1 - units] + choice.gain
            if choice.learns and table[index, room] > best_gain:
                best_gain, best_depth, best_first = float(table[index, room]), depth, index
        picks[depth] = table.argmax(0)
        gains = table.max(0)
        if not np.isfinite(gains[room]):
            break
    chosen: list[int | None] = [None] * len(layers)
    left = room
    for depth in range(best_depth, len(layers)):
        pick = best_first if depth == best_depth else int(picks[depth][left])
        chosen[depth] = pick
        left -= int(np.ceil(layers[depth][pick].weight_bytes / unit))
    return best_gain, chosen
