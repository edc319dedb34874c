"""The best sparse update under a memory budget, exactly: how deep biases learn, and which share of which weights.

Gains and bytes both add up, so that of all choices made from the output on only those matter for which more bytes
buy more gain. That front, extended layer by layer, holds the best choice for every depth and every budget at once:
what the paper searches by evolution is found without rounding or luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from edgetune.contract import Plan
from edgetune.errors import BudgetError
from edgetune.graph import Call, Graph, trace
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.profile import Cost, profile
from edgetune.sparse.contributions import Contributions
from edgetune.sparse.scheme import place_windows, sparse_plan
from edgetune.units import format_bytes

Option = tuple[int, float]
"""Bytes and gain."""


@dataclass(frozen=True)
class Front:
    """Totals worth having, bytes and gain both rising; each is total `origin` of the front before, plus `choice`."""

    size: np.ndarray
    gain: np.ndarray
    origin: np.ndarray
    choice: np.ndarray


def extended(front: Front, options: Sequence[Option], capacity: int) -> Front:
    """The front after one more layer, of which one of `options` is taken."""
    size = np.add.outer(front.size, [size for size, _ in options])
    gain = np.add.outer(front.gain, [gain for _, gain in options])
    fitting = np.flatnonzero(size <= capacity)
    order = fitting[np.lexsort((-gain.flat[fitting], size.flat[fitting]))]
    sorted_gain = gain.flat[order]
    worth = order[np.concatenate([[True], sorted_gain[1:] > np.maximum.accumulate(sorted_gain)[:-1]])] \
        if len(order) else order
    origin, choice = np.divmod(worth, len(options))
    return Front(size.flat[worth], gain.flat[worth], origin.astype(np.int32), choice.astype(np.int16))


def best_update(depths: Mapping[int, Option], layers: Sequence[Sequence[Option]],
                capacity: int) -> tuple[float, int, list[int | None]] | None:
    """The largest total gain within `capacity` bytes: that gain, the depth, and what each layer takes.

    `layers` run from the output to the input; layer l may learn where the depth is at least l + 1. `depths` gives
    bytes and gain of the biases at each depth that may be chosen. A layer takes the number of one of its options, or
    None, which costs and gains nothing. None where nothing fits.
    """
    fronts = [Front(np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int32), np.zeros(1, np.int16))]
    for options in layers:
        fronts.append(extended(fronts[-1], [(0, 0.0), *options], capacity))
    best: tuple[float, int, int] | None = None
    for depth, (size, gain) in sorted(depths.items()):
        row = int(np.searchsorted(fronts[depth].size, capacity - size, side="right")) - 1
        if row >= 0 and (best is None or fronts[depth].gain[row] + gain > best[0]):
            best = float(fronts[depth].gain[row] + gain), depth, row
    if best is None:
        return None
    total, depth, row = best
    taken: list[int | None] = [None] * len(layers)
    for layer in range(depth - 1, -1, -1):
        front = fronts[layer + 1]
        taken[layer] = int(front.choice[row]) - 1 if front.choice[row] else None
        row = int(front.origin[row])
    return total, depth, taken


def choose_sparse(model: nn.Module, sample: torch.Tensor, contributions: Contributions, memory_bytes: int, *,
                  optimizer_copies: int = 1, graph: Graph | None = None) -> Plan:
    """The sparse update that gains the most by `contributions`, on batches like `sample` x (n c h w).

    `memory_bytes` is for what training adds: kept bytes, gradients and optimizer state, the head's included. Bytes
    of biases and masks are predicted by `profile`, those of weights are what the method itself keeps of an input.
    Raises BudgetError, with the smallest budget that works, when not even the head fits.
    """
    graph, copies = graph or trace(model, sample), 1 + optimizer_copies
    convs = graph.layers("conv")[::-1]
    head, deep = (profile(model, sample, sparse_plan(graph, depth, {}), graph=graph) for depth in (0, len(convs)))
    needed = head.kept_bytes + copies * head.grad_bytes
    if needed > memory_bytes:
        raise BudgetError(f"{format_bytes(memory_bytes)} is too little to train even the last layer: the smallest "
                          f"budget that works here is {format_bytes(needed)} ({needed} bytes)")
    sizes = _bias_bytes(graph, head, deep, copies * sample.element_size())
    depths = {0: (0, 0.0)} | {depth: (sizes[depth], gain) for depth, gain in contributions.bias.items()
                              if depth in sizes}
    offered = [list(contributions.weight.get(call.name, {}).items()) for call in convs]
    layers = [[(_weight_bytes(call, ratio, sample, copies), gain) for ratio, gain in own]
              for call, own in zip(convs, offered, strict=True)]
    found = best_update(depths, layers, memory_bytes - needed)
    assert found is not None  # depth 0 fits
    _, depth, taken = found
    chosen = {len(convs) - 1 - layer: offered[layer][option][0] for layer, option in enumerate(taken)
              if option is not None}
    return place_windows(model, graph, sparse_plan(graph, depth, chosen))


def _bias_bytes(graph: Graph, head: Cost, deep: Cost, bytes_per_value: int) -> dict[int, int]:
    """What the last k biases take beside the head, for every k: masks kept on the way, gradients and their state."""
    at = {call.name: index for index, call in enumerate(graph.calls)}
    kept = dict.fromkeys(range(len(graph.calls)), 0)
    for cost, sign in ((deep, 1), (head, -1)):
        for row in cost.layers:  # what belongs to no call of the graph is counted at every depth
            kept[at.get(row.name, len(graph.calls) - 1)] += sign * row.kept_bytes
    sizes, gathered, depth = {}, 0, 0
    for index in range(len(graph.calls) - 1, -1, -1):
        call = graph.calls[index]
        gathered += kept[index]
        if call.kind in ("conv", "norm") and "bias" in call.params:
            gathered += bytes_per_value * call.param_shapes["bias"][0]
        if call.kind == "conv":
            depth += 1
            sizes[depth] = gathered
    return sizes


def _weight_bytes(call: Call, ratio: float, sample: torch.Tensor, copies: int) -> int:
    """What learning that share of a weight takes: the part of the input kept, the gradient and its state."""
    assert call.geometry is not None
    method = SparseUpdate(ratio=ratio)
    x = sample.new_empty((len(sample), *call.in_shapes[0][1:]), device="meta")
    part = method.part(x.new_empty(call.param_shapes["weight"]), call.geometry)
    return (method.save(x, call.geometry).numel() + copies * part.numel()) * sample.element_size()
