"""`edgetune bench recompute`: whole steps of networks in which everything learns, values made again instead of kept.

"exact" keeps what its hosts keep; "sqrt(n)" makes all again but for the last of about sqrt(n) stretches, as textbooks
do; "planner" is `edgetune.stretches.checkpointed` for the lowest peak. Plain, stock autograd, and a method take turns,
each in the memory order in which it is faster. Pretrained networks see real photos.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pydantic import Field
from torch import nn

from edgetune.apply import apply
from edgetune.bench import timing
from edgetune.bench.activations import NETWORKS
from edgetune.bench.arms import stock
from edgetune.bench.steps import LAYOUTS, Stepper, fastest, memory
from edgetune.contract import Plan
from edgetune.draft import last_layers
from edgetune.graph import Graph, trace
from edgetune.kernels import heap
from edgetune.methods.backward.checkpoint import Checkpoint
from edgetune.methods.backward.exact import Exact
from edgetune.record import Record
from edgetune.stretches import checkpointed, sqrt_stretches

RATIOS = ("speedup", "kept_ratio", "peak_ratio", "macs_again")

Choose = Callable[[nn.Module, torch.Tensor, Plan, Graph], Plan]
CHOICES: dict[str, Choose] = {
    "exact": lambda model, x, plan, graph: plan,
    "sqrt(n)": lambda model, x, plan, graph: sqrt_stretches(graph, plan),
    "planner": lambda model, x, plan, graph: checkpointed(model, x, plan, graph=graph),
}


class RecomputeOptions(Record):
    """Which networks, by which choice of stretches, at which size; `data` holds photos and weights.

    `quick` is one round of the first network, in 64 px.
    """

    data: str = os.environ.get("EDGETUNE_DATA", "../shared/data")
    models: tuple[str, ...] = tuple(NETWORKS)
    methods: tuple[str, ...] = tuple(CHOICES)
    size_px: int = Field(224, ge=32)
    batch: int = Field(8, ge=1)
    threads: int = Field(2, ge=1)
    clock: timing.Clock = "wall"
    rounds: int = Field(7, ge=1)
    quick: bool = False


def run(options: RecomputeOptions | None = None,
        progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every network by every choice; `progress` sees each row as soon as it is there."""
    options = options or RecomputeOptions()
    if options.quick:
        options = options.model_copy(update={"rounds": 1, "size_px": 64, "models": options.models[:1]})
    allocator, rows = heap.keep_freed_memory(), list[timing.Row]()
    with timing.threads(options.threads):
        for name in options.models:
            for row in _network(name, options):
                rows.append({**row, "allocator": allocator})
                if progress is not None:
                    progress(rows[-1])
    return timing.result(rows, "cpu")


def _network(name: str, options: RecomputeOptions) -> Iterator[timing.Row]:
    start, data = NETWORKS[name], Path(options.data)
    photos = start.photos(data, start.preprocess(options.size_px), 4 * options.batch)
    chosen = list(range(0, 4 * options.batch, 4))
    x, y = photos.seen(chosen, epoch=0), photos.labels[chosen]
    model: nn.Module = start.model(data, seed=0)
    graph = trace(model, x)
    plan = last_layers(graph, None, Exact(), scales=True)

    def stepper(what: Plan | None, layout: str) -> Stepper:
        own: nn.Module = start.model(data, seed=0)
        if what is None:
            stock(None)(own, x, y)
        else:
            apply(own, what, graph)
        own.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        ready = Stepper(own, x.contiguous(memory_format=LAYOUTS[layout]), y)
        ready.step()
        return ready

    for what in options.methods:  # two networks at a time: many at once would not fit a small machine
        made = CHOICES[what](model, x, plan, graph)
        steppers = {f"{each} {layout}": stepper(by, layout)
                    for each, by in (("plain", None), (what, made)) for layout in LAYOUTS}
        ms, others = timing.interleave({key: own.step for key, own in steppers.items()}, rounds=options.rounds,
                                       device="cpu", clock=options.clock)
        layout, baseline = fastest(ms, what), fastest(ms, "plain")
        again = [call.macs for stretch in Checkpoint.stretches(graph, made) for call in stretch.calls]
        yield {
            "case": f"{name}@{options.size_px} all", "model": name, "size_px": options.size_px, "method": what,
            "batch": options.batch, "threads": options.threads, "layout": layout, "baseline_layout": baseline,
            "baseline_ms": ms[f"plain {baseline}"], "method_ms": ms[f"{what} {layout}"],
            "speedup": ms[f"plain {baseline}"] / ms[f"{what} {layout}"], "macs_again": sum(again) / graph.macs,
            "load": timing.load_average(), "others": others, "clock": options.clock, "quick": options.quick,
            **memory(steppers[f"{what} {layout}"].cost(), steppers[f"plain {baseline}"].cost()),
        }


def summarise(path: str) -> list[timing.Row]:
    """The medians over the networks, one row a machine and method."""
    return timing.medians(timing.read(path), RATIOS, ("machine", "method"))
