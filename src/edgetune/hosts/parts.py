"""Cutting a run of calls into parts that go backward one by one, so that few values say all that they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from edgetune.contract import LayerMethod, Rule, Segment, one_call
from edgetune.graph import Call, Graph
from edgetune.hosts.conv import conv_rule
from edgetune.hosts.light import LIGHT
from edgetune.hosts.pointwise import exact_rule
from edgetune.hosts.tail import Tail, TailRule
from edgetune.recognise import MASKS, SMOOTH


def can_join(call: Call, graph: Graph) -> bool:
    """Whether a call may be a part of a run."""
    if not call.followed or graph.overwrites_for_others(call):
        return False
    if call.kind == "activation":
        return call.function in MASKS or call.function in SMOOTH
    if call.kind == "add":
        return len(set(call.inputs)) == 2
    return call.kind in ("norm", "max_pool", *LIGHT) and len(call.out_shape) in (2, 4)


def parts_of(run: Sequence[Call], method_of: Callable[[Call], LayerMethod], learned: frozenset[str],
             keeps_zeros: bool) -> tuple[Segment, ...]:
    """The parts in their order. `learned` are qualified names; `keeps_zeros` as a codec says."""
    inside = {call.node: call for call in run}
    read = {node for call in run if call.kind == "conv" and set(call.params.values()) & learned for node in call.inputs}
    tails = _tails(run, inside, learned, read)
    ends = {tail.calls[-1].node: tail for tail in tails}
    held = {call.node for tail in tails for call in tail.calls}
    parts = []
    for call in run:
        if call.node in ends:
            parts.append(_tail_part(ends[call.node], keeps_zeros))
        elif call.node not in held:
            parts.append(one_call(_rule(call, method_of), call))
    return tuple(parts)


def _rule(call: Call, method_of: Callable[[Call], LayerMethod]) -> Rule:
    rule = conv_rule(method_of(call), call) if call.kind == "conv" else LIGHT.get(call.kind) or exact_rule(call)
    assert rule is not None, call.kind
    return rule


def _tails(run: Sequence[Call], inside: Mapping[str, Call], learned: frozenset[str], read: set[str]) -> list[Tail]:
    """The norms whose scale learns, or whose ReLU a learning convolution reads, with what alone reads them."""
    tails, taken = list[Tail](), set[str]()
    for call in run:
        if call.kind != "norm":
            continue
        tail = _tail(call, inside, taken)
        if call.params.get("weight", "") in learned or (tail.activation and tail.calls[-1].node in read):
            tails.append(tail)
            taken |= {each.node for each in tail.calls}
    return tails


def _tail(norm: Call, inside: Mapping[str, Call], taken: set[str]) -> Tail:
    add = activation = pool = None
    reader = _reader(norm, inside)
    if reader is not None and reader.kind == "add" and reader.node not in taken:
        add, reader = reader, _reader(reader, inside)
    if reader is not None and reader.function in MASKS:
        activation, reader = reader, _reader(reader, inside)
        if reader is not None and reader.kind == "max_pool":
            pool = reader
    return Tail(norm, add, activation, pool)


def _reader(call: Call, inside: Mapping[str, Call]) -> Call | None:
    """The one call that reads a value, where it is one of the run."""
    return inside.get(call.consumers[0]) if len(call.consumers) == 1 else None


def _tail_part(tail: Tail, keeps_zeros: bool) -> Segment:
    inputs: tuple[str, ...] = tail.norm.inputs
    if tail.add is not None:
        inputs += tuple(node for node in tail.add.inputs if node != tail.norm.node)
    # what is clipped from above as well comes back near that bound, not at it
    bits = tail.activation is not None and (not keeps_zeros or tail.activation.function != "relu")
    return Segment(rule=TailRule(tail, bits), calls=tail.calls, inputs=inputs, outputs=(tail.calls[-1].node,),
                   params=tuple(tail.norm.params.values()))
