"""Writing plans: from which convolutions learn, and by what, to all that follows from it."""

from __future__ import annotations

from collections.abc import Mapping

from edgetune.contract import KeptMethod, Method, Plan
from edgetune.errors import PlanError
from edgetune.graph import Call, Graph


def last_layers(graph: Graph, count: int | None, method: Method, *, scales: bool = False) -> Plan:
    """The plan in which the last `count` convolutions (None: all) learn by `method`, and all that follows learns too.

    Norms after the first learning convolution train their shift, and their scale with `scales`; linear layers train.
    Raises PlanError when the graph has fewer convolutions than asked for.
    """
    convs = graph.layers("conv")
    if count is not None and count > len(convs):
        raise PlanError(f"the last {count} convolutions are asked for, but the network has {len(convs)}: "
                        f"ask for at most {len(convs)}")
    chosen = list(convs if count is None else convs[len(convs) - count:])
    return draft(graph, {call.node: method for call in chosen}, frozenset(call.node for call in chosen),
                 scales=scales)


def draft(graph: Graph, settings: Mapping[str, Method], learning: frozenset[str], scales: bool = False) -> Plan:
    """The plan in which the convolutions `learning` learn, and all behind them that is cheap learns too; every
    convolution behind the first passes its gradient on by its `settings` (both by node).

    Norms learn their shift, and their scale only with `scales`: also those that close a block, which by `last_blocks`
    of mobiletl learn theirs.
    """
    first = next((i for i, call in enumerate(graph.calls) if call.node in learning), len(graph.calls))
    layers: dict[str, tuple[Method, ...]] = {}
    learns: dict[str, tuple[str, ...]] = {}
    for call in graph.calls[first:]:
        if call.kind == "norm" and (roles := _roles(call, ("weight", "bias") if scales else ("bias",))):
            learns[call.name] = roles
        if call.kind == "conv":
            method = settings.get(call.node)
            if method is not None and method.refuse(call) is None:
                layers[call.name] = (method,)
            if call.node in learning:
                learns[call.name] = _roles(call, ("weight", "bias"))
    for call in graph.layers("linear"):
        learns[call.name] = _roles(call, ("weight", "bias"))
    return Plan(input_shape=graph.input_shape, layers=layers, learns=learns)


def held_by(plan: Plan, graph: Graph, hold: KeptMethod | None) -> Plan:
    """The plan in which `hold` says how its convolutions hold what they keep; the same plan where it is None."""
    if hold is None:
        return plan
    convs = {call.name for call in graph.layers("conv")}
    return plan.model_copy(update={"layers": {
        name: (*stack, hold) if name in convs else stack for name, stack in plan.layers.items()}})


def _roles(call: Call, wanted: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(role for role in wanted if role in call.params)
