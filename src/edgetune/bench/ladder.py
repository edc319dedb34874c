"""The memory ladder: one network, batch 1, from full training in plain torch down to sparse update in integers.

Lin et al., "On-Device Training Under 256KB Memory" (NeurIPS 2022), show it for MobileNetV2 of width 0.35 at 128 px.
Every rung is measured here: a whole step (forward, loss, backward, update) at the allocator, parameters left out.
Beside it stands what a C program would take for the same step, copies of what learns included: `arena_bytes` where it
goes layer by layer, `streamed_bytes` where it goes through blocks by rows and channels (see `quantize.arena`). Random
weights do.

Further rows say what learning adds to inference, for every released scheme and for the last k layers: `extra_bytes` by
the arena, `added_bytes` by the paper's memory model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.allocator import peak_during
from edgetune.bench import timing
from edgetune.bench.arms import Trainee, last, planned, qas
from edgetune.bench.cells import kept_for_backward
from edgetune.bench.costs import macs
from edgetune.costs import unrestrained
from edgetune.errors import PlanError
from edgetune.methods.backward.exact import Exact
from edgetune.models import load_model
from edgetune.quantize import (
    Quantized,
    Stepped,
    added_bytes,
    extra_bytes,
    flash_bytes,
    last_layers,
    quantize,
    training_arena,
)
from edgetune.quantize.network import Learns
from edgetune.record import Record
from edgetune.sparse import released_schemes, scheme_learns
from edgetune.update import as_it_comes

ALL = 10**6
CALIBRATION = 4
"""Random pictures."""


class LadderOptions(Record):
    """The network, its scheme, and how many classes its head tells apart (2: a person is there, or not).

    What learning adds to inference is told for `more_classes` too.
    """

    model: str = "mobilenet_v2_0.35"
    size_px: int = 128
    classes: int = 2
    more_classes: tuple[int, ...] = (10,)
    scheme: str = "mobilenet_v2_0.35-99KB"
    last: tuple[int, ...] = (2, 4, 6, 8, 10, 12, 16, 20, 25)
    seed: int = 0
    quick: bool = False


@dataclass(frozen=True)
class Case:
    """A network in eval mode, its integer twin, and what learns by the scheme."""

    model: nn.Module
    quantized: Quantized
    sparse: Learns
    x: torch.Tensor

    @property
    def whole(self) -> Learns:
        """All convolutions and the head learn."""
        return last_layers(self.quantized.graph, ALL)


@dataclass(frozen=True)
class Rung:
    """One way to train. A program for it learns `learns` (None: there is none) and computes in `number_bytes`.

    `published_bytes` is what the paper gives.
    """

    method: str
    prepare: Callable[[Case], Trainee]
    published_bytes: int
    learns: Callable[[Case], Learns] | None = None
    number_bytes: int = 1
    update_as_it_comes: bool = False


def _plain(case: Case) -> Trainee:
    return Trainee(unrestrained(case.model).eval())


def _exact(case: Case) -> Trainee:
    return planned(last(None, Exact()))(case.model, case.x, torch.zeros(len(case.x), dtype=torch.long))


def _whole(case: Case) -> Trainee:
    return qas(case.quantized, case.whole, Stepped)


def _sparse(case: Case) -> Trainee:
    return qas(case.quantized, case.sparse, Stepped)


RUNGS = (
    Rung("plain torch", _plain, 303_000_000),
    Rung("exact hosts", _exact, 5_700_000, lambda case: case.whole, number_bytes=4),
    Rung("int8 with QAS", _whole, 2_900_000, lambda case: case.whole),
    Rung("sparse update", _sparse, 335_000, lambda case: case.sparse),
    Rung("update as it comes", _sparse, 141_000, lambda case: case.sparse, update_as_it_comes=True),
)


def run(options: LadderOptions | None = None, progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every rung; `progress` sees each row as soon as it is there. Raises PlanError for an unknown scheme."""
    options = options or LadderOptions()
    rows: list[timing.Row] = []
    with timing.threads(1):
        for row in (*_rungs(options), *_extras(options, options.classes),
                    *(row for classes in options.more_classes for row in _extras(options, classes))):
            rows.append({**_stamp(options), **row})
            if progress is not None:
                progress(rows[-1])
    return timing.result(rows)


def _stamp(options: LadderOptions) -> timing.Row:
    return {"case": f"{options.model}@{options.size_px}", "batch": 1, "threads": 1, "classes": options.classes,
            "scheme": options.scheme, "seed": options.seed, "quick": options.quick}


def _case(options: LadderOptions) -> Case:
    schemes = released_schemes()
    if options.scheme not in schemes:
        raise PlanError(f"scheme '{options.scheme}' is unknown: choose from {', '.join(schemes)}")
    torch.manual_seed(options.seed)
    model = load_model(options.model, num_classes=options.classes).eval()
    pictures = torch.randn(CALIBRATION, 3, options.size_px, options.size_px)
    quantized = quantize(model, pictures.split(1))
    return Case(model, quantized, scheme_learns(quantized, schemes[options.scheme]), pictures[:1])


def _rungs(options: LadderOptions) -> Iterator[timing.Row]:
    for rung in RUNGS[-1:] if options.quick else RUNGS:
        case = _case(options)
        trainee, labels = rung.prepare(case), torch.zeros(1, dtype=torch.long)
        kept = kept_for_backward(trainee.model, case.x)
        forward_macs, backward_macs = macs(trainee.model, case.x, labels)
        yield {"method": rung.method, "kept_bytes": kept, "peak_bytes": step_peak(trainee, case.x, rung),
               "forward_macs": forward_macs, "backward_macs": backward_macs,
               "published_bytes": rung.published_bytes, **_arenas(rung, case)}


def step_peak(trainee: Trainee, x: torch.Tensor, rung: Rung) -> int:
    """The most bytes that one step on x (1 c h w) held beyond what was there before, from the allocator."""
    optimizer, labels = trainee.optimizer(trainee.model, 0.0, 0.0, 0), torch.zeros(1, dtype=torch.long)

    def update(parameter: nn.Parameter | None = None) -> None:
        trainee.rescale(trainee.model)
        optimizer.step()

    def step() -> None:
        optimizer.zero_grad()
        loss: Any = F.cross_entropy(trainee.model(x), labels)
        if rung.update_as_it_comes:
            with as_it_comes(trainee.model, update):
                loss.backward()
        else:
            loss.backward()
            update()

    step()  # what is made once and kept does not count
    optimizer.zero_grad()
    return peak_during(x.device, step)


def _arenas(rung: Rung, case: Case) -> timing.Row:
    if rung.learns is None:
        return {}
    sizes = {streams: training_arena(case.quantized.graph, rung.learns(case), streams=streams,
                                     update_as_it_comes=rung.update_as_it_comes, number_bytes=rung.number_bytes).size
             for streams in (False, True)}
    return {"arena_bytes": sizes[False], "streamed_bytes": sizes[True]}


def _extras(options: LadderOptions, classes: int) -> Iterator[timing.Row]:
    """What each choice of what learns adds to inference; a program that updates as it comes, by rows and channels."""
    case = _case(options.model_copy(update={"classes": classes}))
    graph = case.quantized.graph
    choices: dict[str, Learns] = {"inference": {}}
    choices |= {scheme.name: scheme_learns(case.quantized, scheme) for scheme in released_schemes().values()
               if scheme.network == options.model}
    choices |= {f"last {count}": last_layers(graph, count) for count in options.last}
    for method, learns in choices.items():
        yield {"case": f"{options.model}@{options.size_px}, {classes} classes", "method": method, "classes": classes,
               "streamed_bytes": training_arena(graph, learns).size, "extra_bytes": extra_bytes(graph, learns),
               "added_bytes": added_bytes(graph, learns), "flash_bytes": flash_bytes(graph)}
