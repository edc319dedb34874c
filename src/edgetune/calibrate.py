"""What learning a layer is worth, and what of that a method gains, from one batch."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.alone import Gradients, Reference, add_to
from edgetune.apply import apply
from edgetune.contract import KeptMethod, Method, Plan, qualified
from edgetune.draft import draft, held_by
from edgetune.graph import Call, Graph

CHUNK = 2
"""Samples that go through at a time. Few, as what moves all samples alike is learned first, and the rest remains."""

FLOOR = 0.01
"""Share of the mean energy of a pattern of taps that every pattern is taken to have at least."""


@dataclass(frozen=True)
class Gauge:
    """One method on a network, by layer: `own`, its settings there; `share`, that of the squared exact gradient which
    lies in the part of the weight that learns; `fidelity`, the cosine between the method's gradient of that part, all
    layers using the method, and the exact one, every pattern of taps counting alike; `alone`, the same where all other
    layers are exact, as far as that can be told. Layers that it refuses have no settings: they are exact meanwhile."""

    own: Mapping[str, Method]
    share: Mapping[str, float]
    fidelity: Mapping[str, float]
    alone: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """`importance[layer]`: squared norm of the exact gradient (Fisher-style); a gauge of each method.

    Squares and products are summed over parts of the batch.
    """

    importance: Mapping[str, float]
    gauges: Mapping[Method, Gauge]


def calibrate(model: nn.Module, graph: Graph, batch: tuple[torch.Tensor, torch.Tensor],
              methods: Sequence[Method], chunk: int = CHUNK, hold: KeptMethod | None = None) -> Calibration:
    """Compare each method's weight gradients with the exact ones on parts of the batch x (n c h w), y (n).

    A method of which only a part of the weight learns has that part where the exact gradients are largest. Methods
    that say to be exact on this network are not run, unless `hold` says how what they keep is held. The model itself is
    left untouched; `chunk` samples go through at a time, so that a small device can calibrate too.
    """
    x, y = batch
    reference, energy, taps = Reference(model, graph), Gradients(), Gradients()
    for part in torch.arange(len(x)).split(chunk):
        for layer, g in reference.run(x[part], y[part], len(x))[0].items():
            add_to(energy, layer, g.double().square())
            add_to(taps, layer, _by_taps(g).T @ _by_taps(g))
    even = {layer: _evening(products) for layer, products in taps.items()}
    trials = [_Trial(model, graph, (method, hold), reference, energy) for method in methods]
    running = [trial for trial in trials if trial.differs]
    for part in torch.arange(len(x)).split(chunk) if running else ():
        exact, tape = reference.run(x[part], y[part], len(x), [trial.segments for trial in running])
        for trial in running:
            trial.together.see(exact, trial.gradients(x[part], y[part], len(x)), trial.part, even)
            trial.alone.see(exact, reference.gradients(trial.segments, tape), trial.part, even)
    return Calibration({layer: float(squares.sum()) for layer, squares in energy.items()},
                       {trial.method: trial.gauge() for trial in trials})


def _by_taps(gradient: torch.Tensor) -> torch.Tensor:
    """gw (o i u v) as float64 (o i, u v)."""
    return gradient.double().flatten(2).flatten(0, 1)


def _evening(products: torch.Tensor) -> torch.Tensor:
    """The matrix (u v, u v) behind which gradients have as much energy in every pattern of taps.

    `products` (u v, u v) are sums of products of taps. Most of a kernel's gradient lies in the mean of its taps, which
    is learned in a few steps; what the other patterns would gain counts from then on.
    """
    values, patterns = torch.linalg.eigh(products)
    return patterns * (values.clamp(min=0) + FLOOR * values.mean()).clamp(min=sys.float_info.min).rsqrt()


@dataclass
class _Cosines:
    """Cosines by layer between gradients, over all their parts and with every pattern of taps counting alike."""

    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))

    def see(self, exact: Gradients, found: Gradients, part: Callable[[str, torch.Tensor], torch.Tensor],
            even: Gradients) -> None:
        for layer, g in found.items():
            ours, theirs = ((_by_taps(each) @ even[layer]).flatten() for each in (g, part(layer, exact[layer])))
            for at, (left, right) in enumerate(((ours, theirs), (ours, ours), (theirs, theirs))):
                self.sums[layer][at] += float(left @ right)

    def all(self) -> dict[str, float]:
        return {layer: dot / max((ours * theirs) ** 0.5, sys.float_info.min)
                for layer, (dot, ours, theirs) in self.sums.items()}


class _Trial:
    """One method, with how what it keeps is held, run beside the exact gradients unless it says to be exact."""

    def __init__(self, model: nn.Module, graph: Graph, way: tuple[Method, KeptMethod | None], reference: Reference,
                 energy: Gradients) -> None:
        (method, hold), self.energy, self.together, self.alone = way, energy, _Cosines(), _Cosines()
        self.method = method
        self.convs = {call.name: call for call in graph.layers("conv")}
        self.own = {name: method.placed(energy[name].sqrt(), call.geometry) for name, call in self.convs.items()
                    if name in energy and call.geometry is not None and method.refuse(call) is None}
        self.differs = not method.exact_on(graph) or hold is not None
        if self.differs:
            held = () if hold is None else (hold,)
            self.segments = {} if method.learns_as else reference.alone(
                {name: (own, *held) for name, own in self.own.items()})
            settings = {call.node: self.own[call.name] for call in graph.layers("conv") if call.name in self.own}
            plan = held_by(draft(graph, settings, frozenset(call.node for call in graph.layers("conv"))), graph, hold)
            self.twin = copy.deepcopy(model)
            apply(self.twin, plan, graph)
            self.twin.eval()
            self.learners = _learners(self.twin, self.convs, plan)

    def part(self, layer: str, gradient: torch.Tensor) -> torch.Tensor:
        """What of it learns."""
        geometry, own = self.convs[layer].geometry, self.own.get(layer)
        return gradient if own is None or geometry is None else own.part(gradient, geometry)

    def gradients(self, x: torch.Tensor, y: torch.Tensor, count: int) -> Gradients:
        """Those of what learns of the convolutions' weights, all layers using the method."""
        self.twin.zero_grad()
        (F.cross_entropy(self.twin(x), y, reduction="sum") / count).backward()  # type: ignore[no-untyped-call]
        return {layer: p.grad for layer, p in self.learners.items() if p.grad is not None}

    def gauge(self) -> Gauge:
        share = {layer: min(float(self.part(layer, self.energy[layer]).sum())
                            / max(float(self.energy[layer].sum()), sys.float_info.min), 1.0) for layer in self.own}
        fidelity = self.together.all() if self.differs else dict.fromkeys(self.energy, 1.0)
        return Gauge(self.own, share, fidelity, self.alone.all())


def _learners(twin: nn.Module, convs: Mapping[str, Call], plan: Plan) -> dict[str, nn.Parameter]:
    """Each convolution with its weight, or with what learns in its place."""
    names = {call.params["weight"]: name for name, call in convs.items()}
    names |= {qualified(name, other): name for name in convs for role, other in plan.stand_ins(name).items()
              if role == "weight"}
    return {names[name]: p for name, p in twin.named_parameters() if name in names and p.requires_grad}


def drawn_labels(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Labels drawn from the model's own predictions: with them the squared gradient is the Fisher information."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(x)
    model.train(was_training)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(out.float().softmax(1).cpu(), 1, generator=generator)[:, 0].to(x.device)
