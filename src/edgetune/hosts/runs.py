"""Cutting a graph into runs that can be replaced by one call each."""

from __future__ import annotations

from edgetune.graph import Call, Graph


def convex_runs(graph: Graph, eligible: set[str], anchors: set[str]) -> list[tuple[Call, ...]]:
    """Connected runs of eligible calls, each with an anchor in it, that no path leaves and enters again.

    Calls before the first anchor on every path into the run are left out: they gain nothing from being inside.
    """
    eligible = eligible & _below_anchors(graph, eligible, anchors)
    while True:
        owner = _components(graph, eligible)
        offender = _reentrant(graph, owner)
        if offender is None:
            break
        eligible = eligible - {offender}
        eligible &= _below_anchors(graph, eligible, anchors)
    members: dict[str, list[Call]] = {}
    for call in graph.calls:
        if call.node in owner:
            members.setdefault(owner[call.node], []).append(call)
    return [tuple(run) for run in members.values() if any(call.node in anchors for call in run)]


def _below_anchors(graph: Graph, eligible: set[str], anchors: set[str]) -> set[str]:
    """Anchors, and the eligible calls that an anchor's value reaches through eligible calls."""
    reached: set[str] = set()
    for call in graph.calls:
        if call.node in eligible and (call.node in anchors or any(node in reached for node in call.inputs)):
            reached.add(call.node)
    return reached


def _components(graph: Graph, eligible: set[str]) -> dict[str, str]:
    """Union of eligible neighbours: node -> the run's first node."""
    owner = {node: node for node in eligible}

    def root(node: str) -> str:
        while owner[node] != node:
            owner[node] = owner[owner[node]]
            node = owner[node]
        return node

    for call in graph.calls:
        if call.node in eligible:
            for node in call.inputs:
                if node in eligible:
                    owner[root(call.node)] = root(node)
    return {node: root(node) for node in eligible}


def _reentrant(graph: Graph, owner: dict[str, str]) -> str | None:
    """A call that closes a circle once every run is one call; None when the runs can be put in an order."""
    waiting: dict[str, set[str]] = {}
    for call in graph.calls:
        run = owner.get(call.node, call.node)
        waiting.setdefault(run, set()).update(owner.get(node, node) for node in call.inputs)
    for run, sources in waiting.items():
        sources.discard(run)
    # peel off what only feeds the circles and what only reads from them
    while idle := ({run for run, sources in waiting.items() if not sources & waiting.keys()}
                   | (waiting.keys() - set().union(*waiting.values()))):
        for run in idle:
            del waiting[run]
    for call in reversed(graph.calls):
        own = owner.get(call.node)
        if own in waiting and any(owner.get(node, node) in waiting and owner.get(node) != own
                                  for node in call.inputs):
            return call.node
    return None
