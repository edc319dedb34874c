"""Cost, Budget -> Plan: which layers learn and how each one's gradient is computed."""

from __future__ import annotations

from edgetune.contract import Method, Plan
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
    chosen = {call.node for call in (convs if count is None else convs[len(convs) - count:])}
    first = next((i for i, call in enumerate(graph.calls) if call.node in chosen), len(graph.calls))
    layers: dict[str, tuple[Method, ...]] = {}
    learns: dict[str, tuple[str, ...]] = {}
    for index, call in enumerate(graph.calls):
        roles = _learnable(call, scales) if index >= first or call.kind == "linear" else ()
        if roles:
            learns[call.name] = roles
        if call.kind == "conv" and index >= first and method.refuse(call) is None:
            layers[call.name] = (method,)
    return Plan(input_shape=graph.input_shape, layers=layers, learns=learns)


def _learnable(call: Call, scales: bool) -> tuple[str, ...]:
    """The parameters of a call that train: all of a convolution or linear layer, the shift (and scale) of a norm."""
    if call.kind in ("conv", "linear"):
        return tuple(role for role in ("weight", "bias") if role in call.params)
    if call.kind == "norm":
        return tuple(role for role in ("weight", "bias") if role in call.params and (scales or role == "bias"))
    return ()
