"""Distillation: a network learns from what another says of the same picture, in the middle and at the end.

Features are the maps behind residual blocks (see `edgetune.blocks`), of one sample flattened and of length 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from edgetune.blocks import blocks
from edgetune.errors import Refusal
from edgetune.fold import compiled
from edgetune.graph import Graph, follow, trace
from edgetune.record import Record
from edgetune.rewire import CLIP
from edgetune.route import STANDS_FOR, routed_graph

Tapped = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


class Distil(Record):
    """How much the teacher counts beside the labels, whose cross-entropy counts 1.

    `features` weighs the sum over blocks of the squared distance between normalised maps, `logits` the divergence of
    the student's probabilities from the teacher's.
    """

    features: float = Field(default=0.0, ge=0)
    logits: float = Field(default=0.0, ge=0)


def features_apart(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """sum over maps and samples of |s/|s| - t/|t||^2, each map (n c h w): ().

    Representations aligned as the abstract of DIR-Net asks for; the formula is a reconstruction.
    """
    parts = [(F.normalize(s.flatten(1)) - F.normalize(t.flatten(1))).square().sum()
             for s, t in zip(student, teacher, strict=True)]
    return torch.stack(parts).sum()


def logits_apart(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """sum over samples of KL(teacher | student), logits (n classes): ()."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="sum", log_target=True)


@dataclass(frozen=True)
class Distilled:
    """The loss of a batch x (n c h w), y (n), summed over its samples."""

    settings: Distil
    student: Tapped
    teacher: Tapped

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits, *maps = self.student(x)
        with torch.no_grad():
            told, *shown = self.teacher(x)
        loss = F.cross_entropy(logits, y, reduction="sum")
        if self.settings.logits:
            loss = loss + self.settings.logits * logits_apart(logits, told)
        if self.settings.features:
            loss = loss + self.settings.features * features_apart(maps, shown)
        return loss


def distilled(student: nn.Module, teacher: nn.Module, settings: Distil, sample: torch.Tensor) -> Distilled:
    """The loss by which `student`, in the mode it trains in and with its plan applied, learns from `teacher`.

    Raises Refusal where a network has no blocks to compare, or cannot be followed.
    """
    pairs = list(_pairs(trace(student, sample[:1]), trace(teacher, sample[:1]))) if settings.features else []
    if settings.features and not pairs:
        raise Refusal("", "has no blocks whose features could be compared", "distil logits alone")
    return Distilled(settings, _tapped(student, [own for own, _ in pairs]),
                     _tapped(teacher.eval(), [other for _, other in pairs]))


def _pairs(student: Graph, teacher: Graph) -> Iterator[tuple[str, str]]:
    """The nodes whose values are compared: behind a block, or the pool behind it where the student's has moved."""
    shapes = {call.node: call.out_shape for call in student.calls}
    for block in blocks(teacher):
        own = next((name for name in (block.node, block.node + CLIP) if name in shapes), None)
        candidates = (teacher[block.node], *(teacher[node] for node in teacher[block.node].consumers))
        other = next((call.node for call in candidates if own is not None and call.out_shape == shapes[own]), None)
        if own is not None and other is not None:
            yield own, other


def _tapped(model: nn.Module, names: Sequence[str]) -> Tapped:
    """The network's forward in its present mode, which also gives the values of some nodes."""
    graph = copy.deepcopy(routed_graph(model)) or follow(model)[0]
    if graph is None:
        raise Refusal("", "is a network that cannot be followed", "write its forward without data-dependent control "
                      "flow, or train it without a teacher")
    nodes = {node.meta.get(STANDS_FOR, node.name): node for node in graph.nodes}
    hidden = [name for name in names if name not in nodes]
    if hidden:
        raise Refusal(hidden[0], "is computed within a run of calls", "distil logits alone")
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = ((*output.all_input_nodes, *(nodes[name] for name in names)),)
    run = compiled(model, graph)
    return lambda x: tuple(run(model, x))
