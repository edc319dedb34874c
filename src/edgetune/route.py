"""Running a model's own graph with planned segments in it: code is generated once, and looked up by mode.

Stretches stand around the segments: what of them is in a stretch runs again in backward (see `edgetune.fold`).

Modules keep their types and their names; the model's `forward` becomes the generated code wherever gradients are
wanted, and stays its own elsewhere.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from edgetune.contract import Segment, Stretch
from edgetune.errors import Refusal
from edgetune.fold import compiled, fold, pick
from edgetune.graph import follow
from edgetune.hosts.segment import runner

STANDS_FOR = "edgetune.stands_for"
"""Key of a node's meta under which stands which node of the network's own graph it gives the value of."""


def route(model: nn.Module, segments: list[Segment], stretches: Sequence[Stretch] = ()) -> Callable[[], None]:
    """Give the model a forward in which every segment is one call, and every stretch around some; returns the way back.

    A segment lies in one stretch, or outside of all.
    """
    if not segments and not stretches:
        return lambda: None
    runners = [runner(segment, f"segment_{number}") for number, segment in enumerate(segments)]
    graphs = {mode: _planned(model, mode, segments, runners, stretches) for mode in (False, True)}
    instance_forward = model.__dict__.get("forward")
    model.__dict__["_edgetune"] = _Routes(graphs, instance_forward)
    model.forward = types.MethodType(_routed_forward, model)

    def restore() -> None:
        del model.__dict__["_edgetune"], model.__dict__["forward"]
        if instance_forward is not None:
            model.forward = instance_forward
    return restore


@dataclass(frozen=True)
class _Routes:
    graphs: dict[bool, fx.Graph]
    instance_forward: Callable[..., Any] | None
    _code: dict[bool, Callable[..., Any]] = field(default_factory=dict)

    def code(self, model: nn.Module) -> Callable[..., Any]:
        """The forward of the model's present mode, compiled when first needed."""
        mode = model.training
        if mode not in self._code:
            self._code[mode] = compiled(model, self.graphs[mode])
        return self._code[mode]


def _routed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    routes: _Routes = self.__dict__["_edgetune"]
    if torch.is_grad_enabled():
        return routes.code(self)(self, *args, **kwargs)
    if routes.instance_forward is not None:
        return routes.instance_forward(*args, **kwargs)
    return type(self).forward(self, *args, **kwargs)


def routed_graph(model: nn.Module) -> fx.Graph | None:
    """The graph that an applied model runs in its present mode; None where it runs its own forward."""
    routes: _Routes | None = model.__dict__.get("_edgetune")
    return None if routes is None else routes.graphs[model.training]


def _planned(model: nn.Module, training: bool, segments: list[Segment],
             runners: list[Callable[..., Any]], stretches: Sequence[Stretch]) -> fx.Graph:
    """The model's own graph with its segments put in, as single calls, and then its stretches."""
    before = model.training
    model.train(training)
    try:
        graph, _ = follow(model)
    finally:
        model.train(before)
    assert graph is not None
    nodes = {node.name: node for node in graph.nodes}
    parts: tuple[Segment | Stretch, ...] = (*segments, *stretches)
    for part in parts:
        if any(call.node not in nodes for call in part.calls):
            raise Refusal(part.name, "is called differently in training than in evaluation",
                          "leave it out of the plan")
    stretch_of = {nodes[call.node]: number for number, stretch in enumerate(stretches) for call in stretch.calls}
    for segment, run in zip(segments, runners, strict=True):
        number = stretch_of.get(nodes[segment.calls[0].node])
        made = _replace(graph, nodes, segment, run)
        if number is not None:
            stretch_of |= dict.fromkeys(made, number)
    _sort(graph)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op != "get_attr")
    for number, stretch in enumerate(stretches):
        fold(graph, stretch, [node for node in graph.nodes if stretch_of.get(node) == number], f"stretch_{number}")
    _sort(graph)
    graph.lint()
    return graph


def _replace(graph: fx.Graph, nodes: dict[str, fx.Node], segment: Segment,
             run: Callable[..., Any]) -> list[fx.Node]:
    """Put a segment in; gives the nodes that are there in its place."""
    last = nodes[segment.calls[-1].node]
    with graph.inserting_after(last):
        call = graph.create_node("call_function", run, name=run.__name__)
    with graph.inserting_before(call):
        params = tuple(graph.create_node("get_attr", name) for name in (*segment.params, *segment.state))
    call.args = (*(nodes[name] for name in segment.inputs), *params)
    made = [call]
    for index, name in enumerate(segment.outputs):
        value = call
        if len(segment.outputs) > 1:
            with graph.inserting_after(call):
                value = graph.create_node("call_function", pick, (call, index), name=f"{run.__name__}_{index}")
            made.append(value)
        value.meta[STANDS_FOR] = name
        nodes[name].replace_all_uses_with(value, delete_user_cb=lambda user: user is not call)
        stale, nodes[name] = nodes[name], value
        nodes[f"stale:{stale.name}"] = stale
    for member in reversed(segment.calls):
        node = nodes.pop(f"stale:{member.node}", None) or nodes[member.node]
        if not node.users:
            graph.erase_node(node)
    return made


def _sort(graph: fx.Graph) -> None:
    """Put every node after all that it reads, otherwise keeping the order."""
    *waiting, end = graph.nodes
    placed: set[fx.Node] = set()
    while waiting:
        ready = next(node for node in waiting if placed.issuperset(node.all_input_nodes))
        end.prepend(ready)
        placed.add(ready)
        waiting.remove(ready)


def route_module(model: nn.Module, segment: Segment) -> Callable[[], None]:
    """One layer inside a submodule that could not be followed: its own forward becomes the segment."""
    call = segment.calls[0]
    module = model.get_submodule(call.name)
    if "forward" in module.__dict__ or (not call.params and call.kind != "activation"):
        return lambda: None
    run = runner(segment, "segment")
    names = [name.rpartition(".")[2] for name in (*segment.params, *segment.state)]

    def forward(self: nn.Module, x: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return type(self).forward(self, x)
        return run(x, *(getattr(self, name) for name in names))

    module.forward = types.MethodType(forward, module)

    def restore() -> None:
        del module.__dict__["forward"]
    return restore
