"""Graph, Plan -> segments and stretches: which calls each method takes, and what it remembers of them.

Methods claim runs one after the other, those that say how values are held behind the others; what is left on the
gradient's path goes to the exact hosts. Stretches that run again stand around all of these.
"""

from __future__ import annotations

import torch

from edgetune.contract import (
    ArithmeticMethod,
    CodedMethod,
    KeptMethod,
    LayerMethod,
    Plan,
    Segment,
    Stretch,
    one_call,
    qualified,
)
from edgetune.errors import Refusal
from edgetune.graph import Call, Graph
from edgetune.hosts.conv import conv_rule
from edgetune.hosts.pointwise import exact_rule, takes_along
from edgetune.hosts.runs import segment_of
from edgetune.methods.backward.exact import Exact


def claim(graph: Graph, plan: Plan) -> list[Segment]:
    """Which segments the plan makes of the graph: method by method, those that say how things are held behind the
    others, then exact hosts along the gradient's path."""
    segments: list[Segment] = []
    taken: set[str] = set()
    kinds = {type(m) for stack in plan.layers.values() for m in stack}
    # a norm that takes its batch's statistics is torch's, unless its layer's method knows it
    frozen = graph if plan.norms == "frozen" else without(graph, {call.node for call in graph.layers("norm")})
    for kind in sorted(kinds, key=lambda kind: (issubclass(kind, KeptMethod), kind.method)):
        left = graph if issubclass(kind, ArithmeticMethod) else frozen
        if issubclass(kind, CodedMethod):
            _check_held(graph, plan, kind, taken)
            left = without(left, taken)
        for segment in kind.claim(left, plan):
            if not taken & {call.node for call in segment.calls}:
                segments.append(segment)
                taken |= {call.node for call in segment.calls}
    following = dict(zip((call.node for call in frozen.calls), frozen.calls[1:], strict=False))
    for call in on_gradient_path(frozen, plan):
        if call.node in taken or graph.overwrites_for_others(call):
            continue
        if call.kind == "conv":
            method = plan.settings(call.name, LayerMethod) or Exact()
            assert isinstance(method, LayerMethod)
            segments.append(one_call(conv_rule(method, call), call))
        elif (rule := exact_rule(call)) is not None:
            behind = following.get(call.node)
            along = behind is not None and behind.node not in taken and takes_along(call, behind)
            run = (call, behind) if behind is not None and along else (call,)
            taken |= {each.node for each in run}
            segments.append(segment_of(run, rule))
    return segments


def stretches(graph: Graph, plan: Plan, segments: list[Segment], hooked: set[str]) -> list[Stretch]:
    """What of the plan's stretches a gradient comes to: the rest keeps nothing, and need not run again."""
    kinds = {type(m) for stack in plan.layers.values() for m in stack if isinstance(m, KeptMethod)}
    whole = [stretch for kind in sorted(kinds, key=lambda kind: kind.method)
             for stretch in kind.stretches(graph, plan)]
    place = {call.node: number for number, stretch in enumerate(whole) for call in stretch.calls}
    for segment in segments:
        _check_inside(segment, {place.get(call.node) for call in segment.calls}, whole)
    for stretch in whole:
        if hooks := [call.name for call in stretch.calls if call.name in hooked]:
            raise Refusal(hooks[0], "carries hooks, which would be called twice where a stretch runs again",
                          "remove the hooks first, or end the stretch in front of it")
    path = {call.node for call in on_gradient_path(graph, plan)}
    reached = [tuple(call for call in stretch.calls if call.node in path) for stretch in whole]
    return [Stretch(calls) for calls in reached if calls]


def _check_inside(segment: Segment, places: set[int | None], stretches: list[Stretch]) -> None:
    """Refuse stretches that a run of another method crosses, or whose methods would change what they remember."""
    numbers = [number for number in places if number is not None]
    if not numbers:
        return
    start = stretches[numbers[0]].name
    if len(places) > 1:
        raise Refusal(start, f"begins a stretch that runs again, whose border lies inside of {segment.name}, which go "
                      "backward as one", "move the border out of them, or give them another method")
    if segment.state:
        raise Refusal(segment.name, "remembers something of its input from step to step, and would do so twice where "
                      f"the stretch of '{start}' runs again", "give it another method, or leave it out of the stretch")


def _check_held(graph: Graph, plan: Plan, kind: type[KeptMethod], taken: set[str]) -> None:
    """Refuse to hold what the runs of other methods keep in their own way."""
    for call in graph.layers():
        if call.node in taken and plan.settings(call.name, kind) is not None:
            raise Refusal(call.name, f"is given {kind.method}, but another method keeps its values in a way of its own",
                          f"take {kind.method} out of the plan there, or give the layer a method of a single layer")


def without(graph: Graph, taken: set[str]) -> Graph:
    """The graph in which some calls are no layers that a method could take."""
    return graph.model_copy(update={"calls": tuple(
        call.model_copy(update={"kind": "other"}) if call.node in taken else call for call in graph.calls)})


def on_gradient_path(graph: Graph, plan: Plan) -> list[Call]:
    """Calls through which a gradient passes: those that learn, and all that read what they made."""
    learned, reached, path = plan.learned(), set(), []
    for call in graph.calls:
        own = bool(learned & set(call.params.values()))
        # inside a submodule that could not be followed, every layer may lie on the path
        if own or any(node in reached for node in call.inputs) or not call.followed:
            reached.add(call.node)
            path.append(call)
    return path


def check_use(graph: Graph, plan: Plan) -> None:
    """Refuse methods that change gradients where no gradient comes: they would be ignored."""
    reached = {call.name for call in on_gradient_path(graph, plan)}
    for layer, stack in plan.layers.items():
        for method in stack:
            if not (layer in reached or method.rewrites or method.family == "arithmetic" or method.exact_on(graph)):
                raise Refusal(layer, f"is given {method.method}, but no gradient comes to it, as nothing in it or in "
                              "front of it learns", "let something learn there, or take it out of the plan")


def remembering(graph: Graph, plan: Plan) -> tuple[Graph, dict[str, torch.Tensor]]:
    """What methods remember of the layers that the plan gives to them, as it is at first, by qualified name; with the
    graph that knows of these names."""
    added: dict[str, dict[str, str]] = {}
    state: dict[str, torch.Tensor] = {}
    for call in graph.layers():
        if call.name in added:
            continue
        for method in plan.layers.get(call.name, ()):
            for role, tensor in method.state_of(call).items():
                name = added.setdefault(call.name, {})[role] = qualified(call.name, role)
                state[name] = tensor
    return graph.model_copy(update={"calls": tuple(
        call.model_copy(update={"state": added[call.name]}) if call.name in added else call
        for call in graph.calls)}), state
