"""Graph -> blocks: the submodules that take one map, convolve it at least twice and give one map.

Residual blocks, inverted residual blocks and depthwise-separable pairs are found by what they compute, not by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgetune.graph import Call, Graph

BLOCK = "block"


def calls_of(graph: Graph, name: str) -> tuple[Call, ...]:
    """The calls that the submodule `name` makes, its own submodules' too, in the order of execution."""
    return tuple(call for call in graph.calls if f"{call.scope}.".startswith(f"{name}."))


def as_block(graph: Graph, name: str) -> Call | None:
    """The submodule `name` as a single call of kind "block", x (n c h w) -> y (n o h' w').

    None where it takes or gives anything else, is a layer, could not be followed, or calls a layer more than once.
    """
    calls = calls_of(graph, name) if name else ()
    nodes = {call.node for call in calls}
    given = {node for call in calls for node in call.inputs if node not in nodes}
    made = [call for call in calls if any(reader not in nodes for reader in call.consumers)]
    layers = [call.name for call in calls if call.params]
    if len(given) != 1 or len(made) != 1 or len(set(layers)) < len(layers) or not all(call.followed for call in calls):
        return None
    source, last = graph[given.pop()], made[0]
    if len(source.out_shape) != 4 or len(last.out_shape) != 4:
        return None
    return Call(name=name, node=last.node, kind=BLOCK, function=BLOCK, inputs=(source.node,), consumers=last.consumers,
                in_shapes=(source.out_shape,), out_shape=last.out_shape, scope=name.rpartition(".")[0])


@dataclass(frozen=True)
class _Found:
    block: Call
    convs: frozenset[str]
    calls: int
    joins: bool


def blocks(graph: Graph) -> tuple[Call, ...]:
    """The blocks of a network in the order of execution, each as `as_block` gives it.

    The smallest submodules that add a shortcut themselves; elsewhere the smallest with two convolutions of maps. Of
    those around the same convolutions it is the one that computes the most. None shrinks its map more than twice.
    """
    found = list(_candidates(graph))
    residual = _smallest([each for each in found if each.joins])
    beside = [each for each in found if all(each.convs.isdisjoint(other.convs) for other in residual)]
    order = {call.node: place for place, call in enumerate(graph.calls)}
    return tuple(sorted((each.block for each in residual + _smallest(beside)), key=lambda block: order[block.node]))


def _candidates(graph: Graph) -> Iterator[_Found]:
    for name in sorted(_submodules(graph)):  # a name before those inside it
        calls = calls_of(graph, name)
        # squeeze-excite's convolutions see one pixel
        convs = frozenset(call.node for call in calls if call.kind == "conv" and call.out_shape[2:] != (1, 1))
        block = as_block(graph, name) if len(convs) > 1 else None
        if block is not None and _halves_at_most(block):
            joins = any(call.kind == "add" and call.scope == name for call in calls)
            yield _Found(block, convs, len(calls), joins)


def _smallest(found: list[_Found]) -> list[_Found]:
    """Those with no other inside them; of those around the same convolutions the first that computes the most."""
    largest: dict[frozenset[str], _Found] = {}
    for each in found:
        if each.convs not in largest or largest[each.convs].calls < each.calls:
            largest[each.convs] = each
    return [each for convs, each in largest.items() if not any(other < convs for other in largest)]


def _submodules(graph: Graph) -> set[str]:
    names = set[str]()
    for scope in {call.scope for call in graph.calls}:
        parts = scope.split(".")
        names |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return names - {""}


def _halves_at_most(block: Call) -> bool:
    return all(size <= 2 * left + 1 for size, left in zip(block.in_shapes[0][2:], block.out_shape[2:], strict=True))
