"""The choice of stretches against trying every one, and its promises under a budget."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.contract import Plan
from edgetune.cuts import WRITTEN_MACS
from edgetune.draft import last_layers
from edgetune.errors import BudgetError
from edgetune.graph import Call, Graph
from edgetune.methods.backward.checkpoint import Checkpoint
from edgetune.methods.backward.comet import COMET
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.profile import predicted_peak
from edgetune.stretches import checkpointed, sqrt_stretches
from edgetune.timeline import timeline
from nets import NETS, block, scramble


class Narrowing(nn.Module):
    """Five convolutions whose maps shrink, with an add around one of them."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        a, b, c = widths
        self.one, self.two, self.three = block(3, a), block(a, b, stride=2), block(b, b)
        self.four, self.five = block(b, c, 1), nn.Conv2d(c, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x))
        return self.five(self.four(x + self.three(x))).mean((2, 3))


def prepared(model: nn.Module, x: torch.Tensor) -> tuple[Graph, Plan]:
    graph = et.trace(model, x)
    return graph, last_layers(graph, None, Exact(), scales=True)


def every_choice(names: list[str]) -> Iterator[dict[str, int]]:
    """Every way to give consecutive layers a stretch, or none: layer -> its number."""
    def extend(at: int, last: int | None, number: int) -> Iterator[dict[str, int]]:
        if at == len(names):
            yield {}
            return
        options: list[int | None] = [None, number, *([last] if last is not None else [])]
        for choice in options:
            for rest in extend(at + 1, choice, number + (choice == number)):
                yield rest | ({} if choice is None else {names[at]: choice})
    yield from extend(0, None, 0)


def marked(plan: Plan, numbers: dict[str, int]) -> Plan:
    return plan.model_copy(update={"layers": {
        name: (*stack, *([Checkpoint(stretch=numbers[name])] if name in numbers else []))
        for name, stack in plan.layers.items()}})


def again(graph: Graph, plan: Plan) -> int:
    """What is computed again: products, and numbers written."""
    return sum(work(call) for stretch in Checkpoint.stretches(graph, plan) for call in stretch.calls)


def work(call: Call) -> int:
    return call.macs + WRITTEN_MACS * math.prod(call.out_shape)


@pytest.mark.parametrize("widths", [(8, 16, 24), (16, 8, 32)])
def test_the_choice_is_about_the_best_of_all(widths: tuple[int, ...]) -> None:
    torch.manual_seed(4)
    model, x = scramble(Narrowing(widths)), torch.randn(4, 3, 32, 32)
    graph, plan = prepared(model, x)
    every = [marked(plan, numbers) for numbers in every_choice([call.name for call in graph.layers("conv")])]
    peaks = [(predicted_peak(model, x, each, graph), again(graph, each)) for each in every]
    lowest = min(peaks)[0]
    found = checkpointed(model, x, plan, graph=graph)
    assert predicted_peak(model, x, found, graph) <= 1.03 * lowest
    whole = predicted_peak(model, x, plan, graph)
    for share in (0.3, 0.6, 0.9):
        budget = int(1.01 * lowest + share * (whole - lowest))
        chosen = checkpointed(model, x, plan, memory_bytes=budget, graph=graph)
        least = min(size for peak, size in peaks if peak <= budget)
        assert predicted_peak(model, x, chosen, graph) <= budget
        assert again(graph, chosen) <= 1.25 * least + 0.03 * sum(map(work, graph.calls))


def test_no_more_than_the_textbook_and_less_again_for_more_memory() -> None:
    model, x = et.load_model("resnet20"), torch.randn(4, 3, 32, 32)
    graph, plan = prepared(model, x)
    whole, textbook, lowest = (predicted_peak(model, x, each, graph) for each in
                               (plan, sqrt_stretches(graph, plan), checkpointed(model, x, plan, graph=graph)))
    assert lowest <= textbook < whole
    found = []
    for share in (0.25, 0.75, 1.0):
        made = checkpointed(model, x, plan, memory_bytes=int(lowest + share * (whole - lowest)), graph=graph)
        found.append(again(graph, made))
        assert predicted_peak(model, x, made, graph) <= lowest + share * (whole - lowest)
        assert made.learns == plan.learns
    assert found == sorted(found, reverse=True) and found[0] > 0 and found[-1] == 0


def test_too_small_a_budget_is_refused_with_one_that_works() -> None:
    model, x = scramble(NETS["Residual"]()), torch.randn(4, 3, 32, 32)
    graph, plan = prepared(model, x)
    with pytest.raises(BudgetError, match="smallest budget that works here is") as refused:
        checkpointed(model, x, plan, memory_bytes=1000, graph=graph)
    smallest = int(str(refused.value).rpartition("(")[2].partition(" bytes")[0])
    made = checkpointed(model, x, plan, memory_bytes=smallest, graph=graph)
    assert predicted_peak(model, x, made, graph) <= smallest


@pytest.mark.parametrize("net", sorted(NETS.keys() - {"Opaque", "Untraceable"}))  # those do not run on meta
def test_goes_around_what_may_not_run_again(net: str) -> None:
    model, x = scramble(NETS[net]()), torch.randn(3, 3, 32, 32)
    graph = et.trace(model, x)
    convs = [call.name for call in graph.layers("conv")]
    for methods in ((PooledChain(patch_px=2),), (Exact(), COMET())):
        plan = last_layers(graph, None, Exact(), scales=True)
        layers = {name: (methods if name in convs[2:4] else (Exact(),)) for name in plan.layers}
        plan = plan.model_copy(update={"layers": layers})
        made = checkpointed(model, x, plan, graph=graph)
        undo = et.apply(model, made, graph)
        assert model(x).isfinite().all()
        undo()


def test_micro_batches_are_what_is_weighed() -> None:
    model, x = scramble(NETS["Residual"]()), torch.randn(8, 3, 32, 32)
    graph, plan = prepared(model, x)
    part = plan.model_copy(update={"micro_batch": 2})
    made = checkpointed(model, x, part, graph=graph)
    assert made.micro_batch == 2
    assert predicted_peak(model, x, made, graph) < predicted_peak(model, x, part, graph)


def test_the_timeline_ends_where_it_began_and_knows_the_peak() -> None:
    model, x = scramble(NETS["Residual"]()), torch.randn(4, 3, 32, 32)
    graph, plan = prepared(model, x)
    watched = timeline(model, x, plan, graph)
    assert watched is not None
    assert watched.peak_bytes == predicted_peak(model, x, plan, graph, optimizer_copies=0)
    assert max(m.peak for m in (*watched.forward.values(), *watched.backward.values())) == watched.peak_bytes
    kept = sum(value.size for value in watched.values if value.kept is not None)
    assert kept == et.profile(model, x, plan, graph=graph).kept_bytes
