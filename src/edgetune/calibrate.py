"""What learning a layer is worth, and what of that a method gains, from one batch."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.apply import apply
from edgetune.contract import Method, Plan, qualified
from edgetune.draft import draft, last_layers
from edgetune.graph import Graph
from edgetune.methods.backward.exact import Exact

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Gauge:
    """One method on a network, by layer: `own`, its settings there; `share`, that of the squared exact gradient which
    lies in the part of the weight that learns; `fidelity`, the cosine between the method's gradient of that part, all
    layers using the method, and the exact one. Layers that it refuses have no settings: they are exact meanwhile."""

    own: Mapping[str, Method]
    share: Mapping[str, float]
    fidelity: Mapping[str, float]


@dataclass(frozen=True)
class Calibration:
    """`importance[layer]`: squared norm of the exact gradient (Fisher-style); a gauge of each method."""

    importance: Mapping[str, float]
    gauges: Mapping[Method, Gauge]


def calibrate(model: nn.Module, graph: Graph, batch: tuple[torch.Tensor, torch.Tensor],
              methods: Sequence[Method], chunk: int = 8) -> Calibration:
    """Compare each method's weight gradients with the exact ones on the batch x (n c h w), y (n).

    A method of which only a part of the weight learns has that part where the exact gradient is largest. Methods that
    say to be exact on this network are not run. The model itself is left untouched; `chunk` samples go through at a
    time, so that a small device can calibrate too.
    """
    reference = _gradients(model, graph, batch, last_layers(graph, None, Exact()), chunk)
    importance = {layer: _energy(g) for layer, g in reference.items()}
    return Calibration(importance, {method: _gauge(model, graph, batch, method, reference, chunk)
                                    for method in methods})


def _gauge(model: nn.Module, graph: Graph, batch: tuple[torch.Tensor, torch.Tensor], method: Method,
           reference: Gradients, chunk: int) -> Gauge:
    own, parts = dict[str, Method](), dict(reference)
    for call in graph.layers("conv"):
        if call.name in reference and call.geometry is not None and method.refuse(call) is None:
            own[call.name] = method.placed(reference[call.name], call.geometry)
            parts[call.name] = own[call.name].part(reference[call.name], call.geometry)
    share = {layer: min(_energy(parts[layer]) / max(_energy(reference[layer]), sys.float_info.min), 1.0)
             for layer in own}
    if method.exact_on(graph):
        return Gauge(own, share, dict.fromkeys(parts, 1.0))
    convs = graph.layers("conv")
    settings = {call.node: own[call.name] for call in convs if call.name in own}
    found = _gradients(model, graph, batch, draft(graph, settings, frozenset(call.node for call in convs)), chunk)
    return Gauge(own, share, {layer: float(F.cosine_similarity(found[layer].flatten(), part.flatten(), 0))
                              for layer, part in parts.items()})


def _energy(gradient: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2


def drawn_labels(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Labels drawn from the model's own predictions: with them the squared gradient is the Fisher information."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(x)
    model.train(was_training)
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(out.float().softmax(1).cpu(), 1, generator=generator)[:, 0].to(x.device)


def _gradients(model: nn.Module, graph: Graph, batch: tuple[torch.Tensor, torch.Tensor], plan: Plan,
               chunk: int) -> Gradients:
    """Gradients of what learns of the convolutions' weights on the whole batch, on a copy of the model."""
    twin = copy.deepcopy(model)
    apply(twin, plan, graph)
    twin.eval()
    x, y = batch
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        loss = F.cross_entropy(twin(x[part]), y[part], reduction="sum") / len(x)
        loss.backward()
    learners = {call.params["weight"]: call.name for call in graph.layers("conv")}
    learners |= {qualified(layer, other): layer for layer in set(learners.values())
                 for role, other in plan.stand_ins(layer).items() if role == "weight"}
    return {learners[name]: p.grad for name, p in twin.named_parameters() if name in learners and p.grad is not None}
