"""Exact gradients of a network, and what a method makes of one layer's when all behind that layer is exact.

Beside the gradients of a network in which every layer uses the method, this tells apart what a layer loses by itself
and what it loses because the gradient that comes to it is blurred already.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from edgetune.claims import claim, remembering
from edgetune.contract import Method, Needs, Plan, Segment, Tensors
from edgetune.graph import Graph, follow

Gradients = dict[str, torch.Tensor]
"""Weight gradient (o i u v) of each convolution, by layer."""


@dataclass(frozen=True)
class Solo:
    """The segments that methods make of a layer where it is the only one to learn, and what they remember of it."""

    segments: Sequence[Segment]
    state: Tensors


Alone = Mapping[str, Solo]
"""Of each layer."""


def add_to(sums: Gradients, layer: str, more: torch.Tensor) -> None:
    """Add to what a layer has so far, if anything."""
    sums[layer] = sums[layer] + more if layer in sums else more


class Reference:
    """A copy of a network in which everything learns by autograd; the network itself stays as it is."""

    def __init__(self, model: nn.Module, graph: Graph) -> None:
        self.graph, self.twin = graph, copy.deepcopy(model).eval().requires_grad_(True)
        self.flow = follow(self.twin)[0]
        self.weights = {call.name: call.params["weight"] for call in graph.layers("conv")}
        self.tensors = dict((*self.twin.named_parameters(), *self.twin.named_buffers()))

    def alone(self, stacks: Mapping[str, Sequence[Method]]) -> Alone:
        """What each layer's methods make of it; nothing where layers cannot be followed."""
        if self.flow is None:
            return {}
        found = {name: _solo(self.graph, name, stack, self.tensors[self.weights[name]].device)
                 for name, stack in stacks.items()}
        return {name: solo for name, solo in found.items() if solo.segments}

    def run(self, x: torch.Tensor, y: torch.Tensor, count: int, wanted: Sequence[Alone] = ()) -> tuple[Gradients, Tape]:
        """Exact gradients of the mean loss over `count` samples, of which x (n c h w), y (n) are a part; their tape."""
        self.twin.zero_grad()
        nodes = {n for alone in wanted for own in alone.values()
                 for each in own.segments for n in (*each.inputs, *each.outputs)}
        tape = Tape(nodes)
        out = self.twin(x) if self.flow is None or not nodes else _Watched(self.twin, self.flow, tape).run(x)
        (F.cross_entropy(out, y, reduction="sum") / count).backward()  # type: ignore[no-untyped-call]
        grads = {layer: self.tensors[weight].grad for layer, weight in self.weights.items()}
        return {layer: grad for layer, grad in grads.items() if grad is not None}, tape

    def gradients(self, alone: Alone, tape: Tape) -> Gradients:
        """Those of every layer by its own method, from exact maps and gradients."""
        found = Gradients()
        for layer, solo in alone.items():
            for segment in solo.segments:
                add_to(found, layer, self._gradient(segment, solo.state, tape, self.weights[layer]))
        return found

    @torch.no_grad()
    def _gradient(self, segment: Segment, state: Tensors, tape: Tape, weight: str) -> torch.Tensor:
        params = {**{name: self.tensors[name].detach() for name in segment.params}, **state}
        needs = Needs(tuple(False for _ in segment.inputs), frozenset({weight}))
        _, kept = segment.rule.forward(segment, [tape.values[node] for node in segment.inputs], params, needs)
        gys = [tape.gradients[node] for node in segment.outputs]
        return segment.rule.backward(segment, kept, gys, params, needs)[1][weight]


class Tape:
    """Values of some nodes, and the gradients that came to them."""

    def __init__(self, nodes: set[str]) -> None:
        self.nodes, self.values, self.gradients = nodes, Gradients(), Gradients()

    def hold(self, node: str, out: torch.Tensor) -> None:
        """Hold a value now, and its gradient once that is there."""
        self.values[node] = out.detach().clone()  # a later layer may write over it
        if out.requires_grad:
            out.register_hook(lambda gradient: self.gradients.update({node: gradient.detach()}))


class _Watched(fx.Interpreter):
    """Runs a network node by node."""

    def __init__(self, model: nn.Module, flow: fx.Graph, tape: Tape) -> None:
        super().__init__(model, graph=flow)
        self.tape = tape

    def run_node(self, n: fx.Node) -> object:
        out = super().run_node(n)
        if n.name in self.tape.nodes and isinstance(out, torch.Tensor):
            self.tape.hold(n.name, out)
        return out


def _solo(graph: Graph, layer: str, stack: Sequence[Method], device: torch.device) -> Solo:
    """What a plan in which only this layer learns, and by these methods, makes of its calls."""
    plan = Plan(input_shape=graph.input_shape, layers={layer: tuple(stack)}, learns={layer: ("weight",)})
    graph, state = remembering(graph, plan)
    segments = [segment for segment in claim(graph, plan) if any(call.name == layer for call in segment.calls)
                and all(call.followed for call in segment.calls)]
    return Solo(segments, {name: tensor.to(device) for name, tensor in state.items()})
