"""`edgetune bench held`: whole steps of networks in which everything learns, what is kept held in fewer bytes or made
again.

Real photos through pretrained networks, as how small a map becomes depends on what it is. Plain and methods take turns,
each in the memory order in which it is faster. Some steps come before, so that bounds which follow gradients have
settled. "exact" is the host's own exact gradient, with nothing held in fewer bits. "sqrt(n) stretches" run again as in
textbooks, all but the last of about sqrt(n) of them; "planned stretches" are those found for the lowest peak.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import Field
from torch import nn

from edgetune.bench import timing
from edgetune.bench.activations import NETWORKS
from edgetune.bench.arms import KEPT, Prepare, held, planned, recomputed, stock
from edgetune.bench.arms import last as last_by
from edgetune.bench.steps import LAYOUTS, Stepper, fastest, memory
from edgetune.kernels import heap
from edgetune.methods.backward.exact import Exact
from edgetune.record import Record

RATIOS = ("speedup", "kept_ratio", "peak_ratio")
SETTLING = 3
"""Steps before what is measured."""
METHODS: dict[str, Prepare] = {
    "exact": planned(last_by(None, Exact(), scales=True)),
    **{name: held(None, method) for name, method in KEPT.items()},
    "sqrt(n) stretches": recomputed(None, textbook=True),
    "planned stretches": recomputed(None),
}


class HeldOptions(Record):
    """Which networks, by which methods, at which size; `data` holds photos and weights. `quick`: one round."""

    data: str = os.environ.get("EDGETUNE_DATA", "../shared/data")
    models: tuple[str, ...] = tuple(NETWORKS)
    methods: tuple[str, ...] = tuple(METHODS)
    size_px: int = Field(224, ge=32)
    batch: int = Field(8, ge=1)
    threads: int = Field(2, ge=1)
    clock: timing.Clock = "wall"
    rounds: int = Field(7, ge=1)
    quick: bool = False


def run(options: HeldOptions | None = None, progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every network by every method; `progress` sees each row as soon as it is there."""
    options = options or HeldOptions()
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


def _network(name: str, options: HeldOptions) -> Iterator[timing.Row]:
    start, data = NETWORKS[name], Path(options.data)
    photos = start.photos(data, start.preprocess(options.size_px), 4 * options.batch)
    chosen = list(range(0, 4 * options.batch, 4))
    x, y = photos.seen(chosen, epoch=0), photos.labels[chosen]

    def stepper(what: str, layout: str) -> Stepper:
        model: nn.Module = start.model(data, seed=0)
        METHODS.get(what, stock(None))(model, x, y)
        model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        own = Stepper(model, x.contiguous(memory_format=LAYOUTS[layout]), y)
        for _ in range(SETTLING):
            own.step()
        return own

    for what in options.methods:  # two networks at a time: many at once would not fit a small machine
        steppers = {f"{each} {layout}": stepper(each, layout) for each in ("plain", what) for layout in LAYOUTS}
        ms, others = timing.interleave({key: own.step for key, own in steppers.items()}, rounds=options.rounds,
                                       device="cpu", clock=options.clock)  # fmt: skip
        layout, baseline = fastest(ms, what), fastest(ms, "plain")
        yield {
            "case": f"{name}@{options.size_px} all",
            "model": name,
            "size_px": options.size_px,
            "method": what,
            "batch": options.batch,
            "threads": options.threads,
            "layout": layout,
            "baseline_layout": baseline,
            "baseline_ms": ms[f"plain {baseline}"],
            "method_ms": ms[f"{what} {layout}"],
            "speedup": ms[f"plain {baseline}"] / ms[f"{what} {layout}"],
            "load": timing.load_average(),
            "others": others,
            "clock": options.clock,
            "quick": options.quick,
            **memory(steppers[f"{what} {layout}"].cost(), steppers[f"plain {baseline}"].cost()),
        }


def summarise(path: str) -> list[timing.Row]:
    """The medians over the networks, one row a machine and method."""
    return timing.medians(timing.read(path), RATIOS, ("machine", "method"))
