"""Calibration: which range of values every map takes, watched on a few batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import fx, nn

from edgetune.errors import DataError, ModelError
from edgetune.graph import evaluating, follow
from edgetune.quantize.record import INT8_HIGH, INT8_LOW, Quantization
from edgetune.record import Frozen

Range = tuple[float, float]


class Ranges(Protocol):
    """How one batch of a map's values and what the batches before said become a range."""

    def batch(self, x: torch.Tensor) -> Range:
        """The range of one batch, x of any shape."""
        ...

    def together(self, ranges: list[Range]) -> Range:
        """The range of all batches."""
        ...


class MinMax(Frozen):
    """From the smallest value seen to the largest: nothing is clipped, one outlier coarsens everything."""

    def batch(self, x: torch.Tensor) -> Range:
        return float(x.min()), float(x.max())

    def together(self, ranges: list[Range]) -> Range:
        return min(low for low, _ in ranges), max(high for _, high in ranges)


class Percentile(Frozen):
    """Leaves out the tails: `keep_percent` of a batch's values lie inside, half of the rest beyond either end.

    The mean of the batches' ends is taken.
    """

    keep_percent: float = Field(99.99, gt=0, le=100)

    def batch(self, x: torch.Tensor) -> Range:
        values, outside = x.flatten().numpy(force=True), 0.5 * (1 - self.keep_percent / 100)
        dropped = int(outside * (len(values) - 1))
        ends = [dropped, len(values) - 1 - dropped]
        low, high = np.partition(values, ends)[ends]
        return float(low), float(high)

    def together(self, ranges: list[Range]) -> Range:
        return sum(low for low, _ in ranges) / len(ranges), sum(high for _, high in ranges) / len(ranges)


def watch(model: nn.Module, batches: Iterable[torch.Tensor], nodes: Collection[str],
          ranges: Ranges) -> dict[str, Range]:
    """Run x (n c h w) batches through the float network and give the range of every node asked for.

    Raises DataError without batches or where a value is no number.
    """
    seen: dict[str, list[Range]] = {node: [] for node in nodes}
    graph, _ = follow(model)
    if graph is None:
        raise ModelError(f"{type(model).__name__} cannot be followed: leave the network in float")
    watcher = _Watcher(model, graph, seen, ranges)
    with evaluating(model), torch.no_grad():
        for x in batches:
            watcher.run(x)
    if not all(seen.values()):
        raise DataError("there is no picture to calibrate with: give at least one batch")
    return {node: ranges.together(found) for node, found in seen.items()}


class _Watcher(fx.Interpreter):
    def __init__(self, model: nn.Module, graph: fx.Graph, seen: dict[str, list[Range]], ranges: Ranges) -> None:
        super().__init__(model, graph=graph)
        self.seen, self.ranges = seen, ranges

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if n.name in self.seen:
            if not bool(out.isfinite().all()):
                raise DataError(f"calibration meets a value that is no number at '{n.name}': "
                                "check the pictures' scaling and the weights")
            self.seen[n.name].append(self.ranges.batch(out))
        return out


def choose(seen: Range, floor: float, otherwise: float) -> Quantization:
    """Scale and zero point for values in `seen`; 0 always has an integer of its own.

    The scale is at least `floor`, the step of what it is rounded from. A map that was never anything but 0 says
    nothing: it is given the range `otherwise`.
    """
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)
    if low == high:
        high = otherwise
    steps = INT8_HIGH - INT8_LOW
    scale = max((high - low) / steps, floor * (1 + 2.0**-40))  # a hair above: their ratio must not round over 1
    zero_point = round(INT8_LOW - low / scale)
    return Quantization(scale=scale, zero_point=min(max(zero_point, INT8_LOW), INT8_HIGH))
