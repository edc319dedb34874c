"""What learning a layer is worth, and how faithful a method's gradient is to the exact one, from one batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.apply import apply
from edgetune.contract import Method, Plan
from edgetune.graph import Graph
from edgetune.methods.backward.exact import Exact

Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Calibration:
    """`importance[layer]`: squared norm of the exact gradient (Fisher-style); `fidelity[method][layer]`: cosine
    between the method's gradient, all layers using it, and the exact one."""

    importance: dict[str, float]
    fidelity: dict[Method, dict[str, float]]


def calibrate(model: nn.Module, graph: Graph, batch: tuple[torch.Tensor, torch.Tensor], plans: Sequence[Plan],
              methods: Sequence[Method], chunk: int = 8) -> Calibration:
    """Compare each method's weight gradients with the exact ones on the batch x (n c h w), y (n).

    `plans` are whole-network plans, one a method. The model itself is left untouched; `chunk` samples go through at a
    time, so that a small device can calibrate too.
    """
    exact = next(plan for plan, method in zip(plans, methods, strict=True) if isinstance(method, Exact))
    reference = _gradients(model, graph, batch, exact, chunk)
    importance = {layer: float(g.square().sum()) for layer, g in reference.items()}
    fidelity: dict[Method, dict[str, float]] = {}
    for plan, method in zip(plans, methods, strict=True):
        found = reference if plan is exact else _gradients(model, graph, batch, plan, chunk)
        fidelity[method] = {layer: float(F.cosine_similarity(found[layer].flatten(), g.flatten(), 0))
                            for layer, g in reference.items()}
    return Calibration(importance, fidelity)


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
    """Weight gradients of the convolutions on the whole batch, on a copy of the model."""
    twin = copy.deepcopy(model)
    apply(twin, plan, graph)
    twin.eval()
    x, y = batch
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        loss = F.cross_entropy(twin(x[part]), y[part], reduction="sum") / len(x)
        loss.backward()
    weights = {call.params["weight"]: call.name for call in graph.layers("conv")}
    return {weights[name]: p.grad for name, p in twin.named_parameters() if name in weights and p.grad is not None}
