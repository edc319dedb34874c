"""Runs of calls: whether they can be put in an order is compared with the standard library's own sorting."""

from __future__ import annotations

import graphlib
import random

import pytest

from edgetune.graph import Call, Graph
from edgetune.hosts.runs import _components, _reentrant


def contracted(graph: Graph, owner: dict[str, str]) -> dict[str, set[str]]:
    """Which runs and single calls read from which, every run being one."""
    reads: dict[str, set[str]] = {}
    for call in graph.calls:
        run = owner.get(call.node, call.node)
        reads.setdefault(run, set()).update({owner.get(node, node) for node in call.inputs} - {run})
    return reads


def upstream(reads: dict[str, set[str]], run: str) -> set[str]:
    """All that a run reads, directly or not."""
    seen, waiting = set[str](), list(reads[run])
    while waiting:
        if (one := waiting.pop()) not in seen:
            seen.add(one)
            waiting += reads[one]
    return seen


@pytest.mark.parametrize("seed", range(100))
def test_a_call_is_named_exactly_where_the_runs_have_no_order(seed: int) -> None:
    chance = random.Random(seed)
    count = chance.randint(2, 14)
    graph = Graph(input_shape=(1,), calls=tuple(
        Call(name=f"n{i}", node=f"n{i}", kind="other", function="f",
             inputs=tuple(f"n{j}" for j in chance.sample(range(i), min(i, chance.choice([1, 1, 2, 3])))))
        for i in range(count)))
    owner = _components(graph, {f"n{i}" for i in range(count) if chance.random() < 0.5})
    found, reads = _reentrant(graph, owner), contracted(graph, owner)
    circles = {run for run in reads if run in upstream(reads, run)}
    try:
        graphlib.TopologicalSorter(reads).prepare()
        assert found is None and not circles
    except graphlib.CycleError:
        assert found is not None and circles
        run = owner[found]  # on a circle, or on the way from one to another
        assert upstream(reads, run) & circles and any(run in upstream(reads, one) | {one} for one in circles)
