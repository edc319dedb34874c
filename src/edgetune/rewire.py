"""model, Plan -> the network whose planned layers compute by arithmetic methods, in place.

Such layers take over the parameters of the convolutions in whose place they stand. Where methods ask for it the
network around them changes too: activations whose values they read become clips to -1 and 1, and a max-pool behind
norm and activation moves in front of both, so that the order is norm, clip, (sign, convolution), pool.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch.nn.functional as F
from torch import fx, nn

from edgetune.contract import ArithmeticMethod
from edgetune.errors import Refusal
from edgetune.fold import compiled
from edgetune.graph import Call, Graph, Rerouted, evaluating, follow, reroute
from edgetune.hosts.arithmetic import ArithmeticConv2d

CLIP = "_clip"
"""What the name of an activation's node ends in, once it is a clip."""
_CARRIES_SIGNS = ("max_pool", "add", "dropout", "identity", "subsample", "pad")
"""Kinds of calls between an activation and a layer that reads its signs."""


def rewire(model: nn.Module, graph: Graph, methods: Mapping[str, ArithmeticMethod]) -> Callable[[], None]:
    """Put arithmetic layers in the places of those that `methods` name; returns the way back.

    Raises Refusal for a layer that is called twice, whose weight another layer shares, or that a method cannot take.
    """
    calls = _calls(model, graph, methods)
    for name, method in methods.items():
        if method.clips and not calls[name].followed:
            raise Refusal(name, "lies inside a module that cannot be followed, so nobody knows what stands in front of "
                          "its signs", "write that forward without data-dependent control flow, or exclude the layer "
                          f"with --skip {name}")
    clips = {node for name, method in methods.items() if method.clips for node in _activations(graph, calls[name])}
    pools = {pool for name, method in methods.items() if method.clips for pool in _pools(graph, calls[name])}
    steps: list[Callable[[], None]] = []
    if clips or pools:
        steps.append(_reorder(model, clips, pools))
    for name, method in methods.items():
        steps.append(_swap(model, name, method, calls[name]))
    return partial(_back, steps)


def _back(steps: list[Callable[[], None]]) -> None:
    while steps:
        steps.pop()()


def _calls(model: nn.Module, graph: Graph, methods: Mapping[str, ArithmeticMethod]) -> dict[str, Call]:
    """The one call of each layer."""
    found: dict[str, Call] = {}
    for call in graph.calls:
        if call.name in methods and call.params:
            if call.name in found:
                raise Refusal(call.name, "is called twice", "give each call a layer of its own, or exclude it with "
                              f"--skip {call.name}")
            found[call.name] = call
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and owners.setdefault(id(weight), name) != name:
            shared = {name, owners[id(weight)]} & found.keys()
            if shared:
                raise Refusal(min(shared), "shares its weight with another layer",
                              f"give it one of its own, or exclude both with --skip {min(shared)}")
    return found


def _activations(graph: Graph, call: Call) -> Iterator[str]:
    """The nodes of the activations whose signs a layer reads, through what leaves signs as they are."""
    waiting, seen = list(call.inputs), set[str]()
    while waiting:
        node = waiting.pop()
        source = graph[node]
        if node in seen:
            continue
        seen.add(node)
        if source.kind == "activation":
            yield node
        elif source.kind in _CARRIES_SIGNS:
            waiting += source.inputs


def _pools(graph: Graph, call: Call) -> Iterator[tuple[str, str, str]]:
    """(norm, activation, pool) where a layer reads a max-pool of a norm's activation, and nobody else reads those."""
    pool = graph[call.inputs[0]]
    if pool.kind != "max_pool":
        return
    activation = graph[pool.inputs[0]]
    norm = graph[activation.inputs[0]] if activation.kind == "activation" else activation
    if norm.kind == "norm" and all(len(each.consumers) == 1 for each in (activation, norm)):
        yield norm.node, activation.node, pool.node


def _reorder(model: nn.Module, clips: set[str], pools: set[tuple[str, str, str]]) -> Callable[[], None]:
    """Let the model's forward be its own graph with clips for activations and pools moved."""
    before = model.__dict__.get("forward")
    graphs: dict[bool, fx.Graph] = {}
    opaque: dict[str, str] = {}
    with evaluating(model):
        for mode in (False, True):
            for module in model.modules():
                module.training = mode
            flow, opaque = follow(model)
            assert flow is not None
            graphs[mode] = _reordered(flow, clips, pools)
    reroute(model, Rerouted(graphs, opaque))
    code = {mode: compiled(model, graph) for mode, graph in graphs.items()}

    def forward(self: nn.Module, x: object) -> object:
        return code[self.training](self, x)

    model.forward = types.MethodType(forward, model)

    def restore() -> None:
        reroute(model, None)
        del model.__dict__["forward"]
        if before is not None:
            model.forward = before
    return restore


def _reordered(graph: fx.Graph, clips: set[str], pools: set[tuple[str, str, str]]) -> fx.Graph:
    nodes = {node.name: node for node in graph.nodes}
    for norm, activation, pool in pools:
        first, last, moved = nodes[norm], nodes[activation], nodes[pool]
        source = first.all_input_nodes[0]
        moved.replace_all_uses_with(last)
        moved.replace_input_with(last, source)
        first.replace_input_with(source, moved)
        first.prepend(moved)
    for name in clips:
        node = nodes[name]
        with graph.inserting_before(node):
            clip = graph.create_node("call_function", F.hardtanh, (node.all_input_nodes[0],), name=name + CLIP)
        clip.meta = dict(node.meta)
        node.replace_all_uses_with(clip)
        graph.erase_node(node)
    graph.lint()
    return graph


def _swap(model: nn.Module, name: str, method: ArithmeticMethod, call: Call) -> Callable[[], None]:
    before, geometry = model.get_submodule(name), call.geometry
    assert isinstance(before, nn.Conv2d) and geometry is not None
    owner, _, leaf = name.rpartition(".")
    parent = model.get_submodule(owner)
    parent._modules[leaf] = ArithmeticConv2d(method, before, geometry)

    def restore() -> None:
        parent._modules[leaf] = before
    return restore
