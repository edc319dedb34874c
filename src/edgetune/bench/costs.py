"""What a step of an arm costs beside one of plain back-propagation: time in turns, peak, products, bytes moved.

It is the step of the whole network, also where accuracy comes from maps behind the frozen part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.bench import timing
from edgetune.bench.adapt import step, trainee_of
from edgetune.bench.arms import BATCH, Arm, Trainee
from edgetune.bench.cases import Bench
from edgetune.bench.cells import Line, kept_for_backward
from edgetune.bench.photos import Split
from edgetune.bench.steps import LAYOUTS, fastest
from edgetune.bench.traffic import Traffic
from edgetune.meter import Book
from edgetune.profile import measured_peak

ROUNDS = 5
CLOCK: timing.Clock = "cpu"


def step_costs(bench: Bench, arm: Arm, plain: Arm, split: Split) -> Line:
    """`method_ms` and `baseline_ms`, each in the memory order in which it is faster; `peak_bytes`, MACs and bytes
    moved of a batch.

    A step is forward, loss, backward and the optimizer. The peak is the allocator's: what a step holds at its worst
    moment, gradients included, parameters and the batch left out.
    """
    bench, chosen = bench.whole(), split[0][:BATCH]
    x, y = bench.source().seen(chosen, 0), bench.photos().labels[chosen]
    trainee = trainee_of(bench, arm, split[0], 0)
    forward_macs, backward_macs = macs(trainee.model, x, y)
    moved_bytes = moved(trainee.model, x, y)
    peak_bytes = measured_peak(trainee.model, x, optimizer_copies=0)
    steps = {
        f"{name} {layout}": _stepping(trainee_of(bench, each, split[0], 0), x, y, layout)
        for name, each in (("method", arm), ("baseline", plain))
        for layout in LAYOUTS
    }
    ms, others = timing.interleave(steps, rounds=ROUNDS, clock=CLOCK)
    method_ms, baseline_ms = (ms[f"{name} {fastest(ms, name)}"] for name in ("method", "baseline"))
    return {
        "peak_bytes": peak_bytes,
        "forward_macs": forward_macs,
        "backward_macs": backward_macs,
        "moved_bytes": moved_bytes,
        "method_ms": method_ms,
        "baseline_ms": baseline_ms,
        "speedup": baseline_ms / method_ms,
        "others": others,
    }


def kept_of_whole(bench: Bench, arm: Arm, split: Split) -> int:
    """Bytes that a batch keeps for backward in the whole network."""
    trainee = trainee_of(bench.whole(), arm, split[0], 0)
    return kept_for_backward(trainee.model, bench.photos().seen(split[0][:BATCH], 0))


def macs(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[int, int]:
    """Multiply-accumulates of the products in forward and backward of x (n c h w), y (n); integers count alike."""
    book = Book(x.device)
    with book:
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    accounts = book.accounts.values()
    return sum(each.forward_macs for each in accounts), sum(each.backward_macs for each in accounts)


def moved(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """Bytes that the operators of forward and backward read and write for x (n c h w), y (n)."""
    with Traffic() as traffic:
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    return traffic.moved_bytes


def _stepping(trainee: Trainee, x: torch.Tensor, y: torch.Tensor, layout: str) -> Callable[[], object]:
    trainee.model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    seen = x.contiguous(memory_format=LAYOUTS[layout])
    # at the rate 0: what is timed must be the same from round to round
    optimizer = trainee.optimizer(trainee.model, 0.0, 0.0, 0)
    return lambda: step(trainee, optimizer, seen, y, None)
