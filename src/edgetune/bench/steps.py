"""Whole training steps: forward, loss, backward and the optimizer's step, plain against the pooled chain.

Plain is stock autograd with the same layers learning and its norms in evaluation, in the memory order (contiguous or
channels last) in which it is faster; so is the method. Both take the same SGD step, fused where weights are
contiguous: torch's fused one copies others first. The forward pass alone, without gradients, is the limit that no
backward method can pass. Kept bytes come from saved-tensor hooks, peaks from
the allocator.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from edgetune.apply import apply
from edgetune.bench import timing
from edgetune.contract import Plan
from edgetune.graph import Graph, trace
from edgetune.kernels import heap
from edgetune.methods.backward.gradient_filter import Taps
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models import load_model
from edgetune.plan import last_layers
from edgetune.profile import Cost, measure
from edgetune.record import Record

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
RATIOS = ("speedup", "over_forward", "kept_ratio", "peak_ratio", "beyond_ratio")


class StepsOptions(Record):
    """Which networks at which sizes; how many of the last convolutions learn; how they are filtered.

    `quick` is one round of the first size.
    """

    models: tuple[str, ...] = ("mobilenet_v2", "resnet18", "mcunet")
    sizes_px: tuple[int, ...] = (224, 128)
    depths: tuple[int | Literal["all"], ...] = (2, 4, "all")
    patch_px: tuple[int, ...] = (2, 4)
    taps: Taps = "mean"
    batch: int = Field(8, ge=1)
    threads: int = Field(2, ge=1)
    clock: timing.Clock = "wall"
    rounds: int = Field(7, ge=1)
    device: str = "cpu"
    seed: int = 0
    quick: bool = False


def run(options: StepsOptions | None = None, progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every network, size and depth; `progress` sees each row as soon as it is there."""
    options = options or StepsOptions()
    if options.quick:
        options = options.model_copy(update={"rounds": 1, "sizes_px": options.sizes_px[:1]})
    allocator = heap.keep_freed_memory()
    rows: list[timing.Row] = []
    with timing.threads(options.threads):
        for row in _rows(options):
            row["allocator"] = allocator
            rows.append(row)
            if progress is not None:
                progress(row)
    return timing.result(rows, options.device)


def summarise(path: str) -> list[timing.Row]:
    """The medians over the networks and sizes, one row a machine, depth and patch size."""
    return timing.medians(timing.read(path), RATIOS, ("machine", "depth", "patch_px"))


def _rows(options: StepsOptions) -> Iterator[timing.Row]:
    for name in options.models:
        for size in options.sizes_px:
            torch.manual_seed(options.seed)
            model = load_model(name).to(options.device)
            x = torch.randn((options.batch, 3, size, size), device=options.device)
            graph = trace(model, x)
            for depth in options.depths:
                yield from _depth(name, _Case(model, graph, x, depth, options))


@dataclass(frozen=True)
class _Case:
    """A network whose last `depth` convolutions learn, on a batch x (n c h w)."""

    model: nn.Module
    graph: Graph
    x: torch.Tensor
    depth: int | Literal["all"]
    options: StepsOptions

    def plain(self, layout: str) -> Stepper:
        """Stock autograd, the same parameters learning."""
        model = self._copy(layout)
        learned = self._plan(1).learned()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learned)
        return Stepper(model, self.x.contiguous(memory_format=LAYOUTS[layout]))

    def filtered(self, layout: str, patch_px: int) -> Stepper:
        """The pooled chain."""
        model = self._copy(layout)
        apply(model, self._plan(patch_px), self.graph)
        return Stepper(model, self.x.contiguous(memory_format=LAYOUTS[layout]))

    def _plan(self, patch_px: int) -> Plan:
        count = None if self.depth == "all" else self.depth
        return last_layers(self.graph, count, PooledChain(patch_px=patch_px, taps=self.options.taps))

    def _copy(self, layout: str) -> nn.Module:
        model: nn.Module = copy.deepcopy(self.model).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        return model.eval()


class Stepper:
    """A model with its optimizer (SGD with momentum): `step` and `forward` are what is timed.

    Without `labels` all of x (n c h w) are of class 0.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        self.model, self.x = model, x
        self.labels = torch.zeros(x.shape[0], dtype=torch.long, device=x.device) if labels is None else labels
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = all(parameter.is_contiguous() for parameter in learned)
        # a rate of almost nothing: thousands of steps on one batch must not run into infinities
        self.optimizer = torch.optim.SGD(learned, lr=1e-9, momentum=0.9, fused=fused, foreach=False)

    def step(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.labels).backward()
        self.optimizer.step()

    def forward(self) -> None:
        with torch.no_grad():
            self.model(self.x)

    def cost(self) -> Cost:
        return measure(self.model, self.x, self.labels, repeats=1)


def _depth(name: str, case: _Case) -> Iterator[timing.Row]:
    options = case.options
    functions: dict[str, Callable[[], object]] = {}
    trainees: dict[str, Stepper] = {}
    for layout in LAYOUTS:
        trainees[f"plain {layout}"] = plain = case.plain(layout)
        functions[f"forward {layout}"], functions[f"plain {layout}"] = plain.forward, plain.step
        for r in options.patch_px:
            trainees[f"{r} {layout}"] = chain = case.filtered(layout, r)
            functions[f"{r} {layout}"] = chain.step
    ms, others = timing.interleave(functions, rounds=options.rounds, device=options.device,
                                    clock=options.clock)
    baseline, forward = fastest(ms, "plain"), fastest(ms, "forward")
    cost = trainees[f"plain {baseline}"].cost()
    for r in options.patch_px:
        layout = fastest(ms, str(r))
        yield {"case": f"{name}@{case.x.shape[-1]} {case.depth if case.depth == 'all' else f'last {case.depth}'}",
               "model": name, "size_px": case.x.shape[-1], "depth": case.depth, "method": "pooled_chain",
               "patch_px": r, "taps": options.taps, "batch": options.batch, "threads": options.threads,
               "device": options.device, "seed": options.seed, "layout": layout, "baseline_layout": baseline,
               "baseline_ms": ms[f"plain {baseline}"], "method_ms": ms[f"{r} {layout}"],
               "forward_ms": ms[f"forward {forward}"], "load": timing.load_average(),
               "others": others, "clock": options.clock, "quick": options.quick,
               "speedup": ms[f"plain {baseline}"] / ms[f"{r} {layout}"],
               "over_forward": ms[f"{r} {layout}"] / ms[f"forward {forward}"] - 1,
               **memory(trainees[f"{r} {layout}"].cost(), cost)}


def fastest(ms: dict[str, float], what: str) -> str:
    """The memory order in which `what` took less time."""
    return min(LAYOUTS, key=lambda layout: ms[f"{what} {layout}"])


def memory(cost: Cost, baseline: Cost) -> timing.Row:
    """Kept bytes, peak, and what of the peak is neither gradients nor optimizer state."""
    beyond, beyond_baseline = (max(c.peak_bytes - c.optimizer_bytes - c.grad_bytes, 0) for c in (cost, baseline))
    return {"kept_bytes": cost.kept_bytes, "kept_bytes_baseline": baseline.kept_bytes,
            "kept_ratio": cost.kept_bytes / baseline.kept_bytes,
            "peak_bytes": cost.peak_bytes, "peak_bytes_baseline": baseline.peak_bytes,
            "peak_ratio": cost.peak_bytes / baseline.peak_bytes,
            "beyond_bytes": beyond, "beyond_bytes_baseline": beyond_baseline}
