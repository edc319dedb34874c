"""Cutting a graph into runs that can be replaced by one call each."""

from __future__ import annotations

from edgetune.contract import Rule, Segment, one_call
from edgetune.graph import Call, Graph


def segment_of(run: tuple[Call, ...], rule: Rule) -> Segment:
    """The run as a segment: what it reads from outside, what others read of it, and its parameters."""
    if not run[0].followed:
        return one_call(rule, run[0])
    inside = {call.node for call in run}
    inputs = tuple(dict.fromkeys(node for call in run for node in call.inputs if node not in inside))
    outputs = tuple(call.node for call in run if any(reader not in inside for reader in call.consumers))
    params = tuple(dict.fromkeys(name for call in run for name in call.params.values()))
    state = tuple(dict.fromkeys(name for call in run for name in call.state.values()))
    return Segment(rule=rule, calls=run, inputs=inputs, outputs=outputs, params=params, state=state)


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
    # peel off what only feeds the circles, then what only reads from them
    feeds = {run: {source for source in sources if source in waiting and source != run}
             for run, sources in waiting.items()}
    left = _unordered(feeds)
    reads: dict[str, set[str]] = {run: set() for run in left}
    for run in left:
        for source in feeds[run] & left:
            reads[source].add(run)
    circles = _unordered(reads)
    for call in reversed(graph.calls):
        own = owner.get(call.node)
        if own in circles and any(owner.get(node, node) in circles and owner.get(node) != own
                                  for node in call.inputs):
            return call.node
    return None


def _unordered(needs: dict[str, set[str]]) -> set[str]:
    """Those that can't be put in an order in which each comes after all it needs."""
    open_needs = {one: len(others) for one, others in needs.items()}
    needed_by: dict[str, list[str]] = {one: [] for one in needs}
    for one, others in needs.items():
        for other in others:
            needed_by[other].append(one)
    ready = [one for one, count in open_needs.items() if not count]
    while ready:
        one = ready.pop()
        del open_needs[one]
        for other in needed_by[one]:
            open_needs[other] -= 1
            if not open_needs[other]:
                ready.append(other)
    return set(open_needs)
