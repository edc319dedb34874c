"""Folding a stretch of an `fx` graph into one call that keeps only what it reads, and runs again in backward.

The stretch becomes a function of tensors and modules, compiled like the graph around it; it holds no part of the model,
so copies of the model compute with their own. What runs it again is `torch.utils.checkpoint`, so nothing of autograd
is re-entered: gradients of parameters come one by one, and hooks on them fire as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from edgetune.contract import Stretch
from edgetune.graph import Call
from edgetune.hosts.cursor import Passes, working_on


def compiled(owner: object, graph: fx.Graph) -> Callable[..., Any]:
    """The graph's source code as a function of the model and the graph's inputs; `owner` is whose forward it is."""
    source = _asking_once(graph).python_code("self")
    scope: dict[str, Any] = dict(source.globals)
    exec(compile(source.src, f"<edgetune forward of {type(owner).__name__}>", "exec"), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def _asking_once(graph: fx.Graph) -> fx.Graph:
    """The same graph, in which every submodule is looked up once: a path to each parameter costs more than a layer.

    Tensors are still read where they are used, from the modules that are there in this very call.
    """
    copy, values, modules = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, fx.Node]()

    def attribute(path: str) -> fx.Node:
        owner, _, name = path.rpartition(".")
        return copy.call_function(getattr, (module(owner), name)) if owner else copy.get_attr(name)

    def module(path: str) -> fx.Node:
        if path not in modules:
            modules[path] = attribute(path)
        return modules[path]

    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = attribute(str(node.target))
        else:
            values[node] = copy.node_copy(node, values.__getitem__)
    return copy


def fold(graph: fx.Graph, stretch: Stretch, members: Iterable[fx.Node], label: str) -> None:
    """Replace `members`, the nodes of the stretch in their order, by one call.

    Nodes that read it may end up in front of it: put the graph in order behind this.
    """
    inside = dict.fromkeys(members)
    outputs = [node for node in inside if any(user not in inside for user in node.users)]
    body = _Body({call.node: call for call in stretch.calls})
    for node in inside:
        body.add(node)
    run = _again(stretch, partial(compiled(stretch, body.finished(outputs)), None), label)
    with graph.inserting_after(next(reversed(inside))):
        call = graph.create_node("call_function", run, name=label)
    with graph.inserting_before(call):
        modules = tuple(graph.create_node("get_attr", name) for name in body.modules)
    call.args = (*body.inputs, *modules)
    with graph.inserting_after(call):
        values = [graph.create_node("call_function", pick, (call, index), name=f"{label}_{index}")
                  for index in range(len(outputs))] if len(outputs) > 1 else [call]
    for node, value in zip(outputs, values, strict=True):
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in inside)
    for node in reversed(inside):
        graph.erase_node(node)


def pick(values: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
    """One of several values that a call gives."""
    return values[index]


class _Body:
    """The inside of a stretch as a graph of its own: `inputs` are the nodes that it reads, `modules` names of what it
    calls; both are its arguments, in this order."""

    def __init__(self, calls: Mapping[str, Call]) -> None:
        self.calls, self.graph = calls, fx.Graph()
        self.inputs: dict[fx.Node, fx.Node] = {}
        self.modules: dict[str, fx.Node] = {}
        self._copies: dict[fx.Node, fx.Node] = {}
        self._start = self.graph.call_function(_nothing)  # arguments stand in front of it

    def add(self, node: fx.Node) -> None:
        """Copy a node; one that is a call of the network itself says so, for whoever watches."""
        call = self.calls.get(node.name)
        if call is not None:
            self.graph.call_function(_named(partial(working_on, call), "working_on"))
        fresh = call is not None and call.in_place and bool(node.all_input_nodes)
        if fresh and node.all_input_nodes[0] not in self._copies:
            # what lies in front of the stretch must be found unchanged when it runs again
            changed = node.all_input_nodes[0]
            self._copies[changed] = self.graph.call_function(torch.clone, (self._value(changed),))
        if node.op == "call_module":
            args = fx.node.map_arg(node.args, self._value)
            assert isinstance(args, tuple)
            self._copies[node] = self.graph.call_function(_call, (self._module(str(node.target)), *args))
            self._copies[node].kwargs = fx.node.map_arg(node.kwargs, self._value)  # type: ignore[assignment]
        else:
            self._copies[node] = self.graph.node_copy(node, self._value)

    def finished(self, outputs: list[fx.Node]) -> fx.Graph:
        """The graph that gives the value of the one output, or a tuple."""
        values = tuple(self._copies[node] for node in outputs)
        self.graph.output(values if len(values) > 1 else values[0])
        for argument in (*self.inputs.values(), *self.modules.values()):
            self._start.prepend(argument)
        self.graph.erase_node(self._start)
        return self.graph

    def _value(self, node: fx.Node) -> fx.Node:
        return self._copies[node] if node in self._copies else self._argument(self.inputs, node, node.name)

    def _module(self, name: str) -> fx.Node:
        return self._argument(self.modules, name, "layer_" + name.replace(".", "_"))

    def _argument(self, given: dict[Any, fx.Node], key: Any, name: str) -> fx.Node:
        if key not in given:
            with self.graph.inserting_before(self._start):
                given[key] = self.graph.placeholder(name)
        return given[key]


def _nothing() -> None:
    pass


def _call(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


def _named(function: Any, name: str) -> Any:
    """Such that generated code can name it."""
    def run(*args: Any) -> Any:
        return function(*args)
    run.__name__ = run.__qualname__ = name
    run.__module__ = __name__
    return run


def _again(stretch: Stretch, function: Callable[..., Any], label: str) -> Callable[..., Any]:
    """`function` such that it keeps only its arguments."""
    first = next((call for call in stretch.calls if call.params), stretch.calls[0])

    @torch.compiler.disable
    def run(*given: Any) -> Any:
        passes = Passes()

        def body(*given: Any) -> Any:
            with passes.running():
                return function(*given)

        working_on(first)
        return checkpoint(body, *given, use_reentrant=False, preserve_rng_state=stretch.may_draw)

    return _named(run, label)
