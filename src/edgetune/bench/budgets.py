"""`edgetune bench budgets`: the planner's plans beside plans of one method, under the same memory.

MobileNetV2 from ImageNet on flowers5 (five folds) and ResNet-20 on a drifted CIFAR-10 (three seeds), at 4, 16 and
64 MiB for a batch of 32, momentum included. A plan of one method lets as many of the last convolutions learn as the
memory holds: what a user without a planner would do. It goes through the batch in parts as large as the planner's, and
a real step shows that it holds the budget, as it does for the planner's plan. The sparse update is chosen exactly by
its Fisher information. The learning rate is chosen once a case, on the exact plan.

Norms are frozen, so that a batch in parts has the gradient of the whole batch: cells train on whole batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from edgetune.apply import apply
from edgetune.bench.adapt import adapt, trainee_of
from edgetune.bench.arms import BATCH, Arm, Prepare, Trainee
from edgetune.bench.cases import IMAGENET_V2, RESNET20, Bench, Case
from edgetune.bench.cells import Line
from edgetune.bench.grid import Grid, GridOptions
from edgetune.bench.photos import Split
from edgetune.contract import Method, Plan
from edgetune.draft import last_layers
from edgetune.errors import BudgetError
from edgetune.graph import Graph, trace
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.plan import Budget, Planner
from edgetune.profile import measured_peak
from edgetune.sparse import choose_sparse, fisher_contributions
from edgetune.units import MIB


class Options(GridOptions):
    """What to run, and where cells are stored."""

    out: str = "bench/results/budgets.jsonl"


Chosen = Callable[[nn.Module, torch.Tensor, torch.Tensor, int], Plan]
"""A plan under so many bytes, from a network, a batch x (n c h w) and its labels y (n)."""
BUDGETS = (4, 16, 64)
RATES = (0.01, 0.02, 0.05)
SHARES = 24
"""A sparse update is chosen for so many shares of the memory, as what it takes beside what it keeps is seen later."""


def by_planner(model: nn.Module, x: torch.Tensor, y: torch.Tensor, memory_bytes: int) -> Plan:
    """What the planner chooses."""
    return Planner(model, x, (x, y)).plan(Budget(memory_bytes=memory_bytes))


def deepest(method: Method, model: nn.Module, x: torch.Tensor, y: torch.Tensor, memory_bytes: int) -> Plan:
    """As many of the last convolutions as fit, all by one method."""
    graph, micro = trace(model, x), parts(model, x, y, memory_bytes)
    made = [_in_parts(last_layers(graph, count, method), micro) for count in range(len(graph.layers("conv")) + 1)]
    return _largest(repr(method), made, model, x, graph, memory_bytes)


def sparsest(model: nn.Module, x: torch.Tensor, y: torch.Tensor, memory_bytes: int) -> Plan:
    """The exact choice of a sparse update that fits."""
    graph, micro = trace(model, x), parts(model, x, y, memory_bytes)
    gains = fisher_contributions(model, graph, (x, y))
    part, made = x[: micro or len(x)], [_in_parts(last_layers(graph, 0, Exact()), micro)]
    for share in range(1, SHARES + 1):
        with suppress(BudgetError):
            found = choose_sparse(model, part, gains, memory_bytes * share // SHARES, graph=graph)
            made.append(_in_parts(found.model_copy(update={"input_shape": tuple(x.shape)}), micro))
    return _largest("sparse", made, model, x, graph, memory_bytes)


def _in_parts(plan: Plan, micro: int | None) -> Plan:
    return plan.model_copy(update={"micro_batch": micro})


_KNOWN: dict[tuple[str, str, tuple[int, ...], int], int] = {}
"""What was found for one fold: memory does not depend on weights, so it holds for the others too."""


def _once(what: str, model: nn.Module, x: torch.Tensor, memory_bytes: int, find: Callable[[], int]) -> int:
    key = (what, type(model).__name__, tuple(x.shape), memory_bytes)
    if key not in _KNOWN:
        _KNOWN[key] = find()
    return _KNOWN[key]


def _largest(
    what: str, made: Sequence[Plan], model: nn.Module, x: torch.Tensor, graph: Graph, memory_bytes: int
) -> Plan:
    """The last of `made`, which need more and more, that a real step shows to fit; the first if none does."""

    def find() -> int:
        low, high = 0, len(made)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if peak(model, x, made[middle], graph) <= memory_bytes else (low, middle)
        return low

    return made[min(_once(what, model, x, memory_bytes, find), len(made) - 1)]


def peak(model: nn.Module, x: torch.Tensor, plan: Plan, graph: Graph) -> int:
    """What a real step by the plan holds at its worst moment, bytes."""
    undo = apply(model, plan, graph)
    try:
        return measured_peak(model, x, micro_batch=plan.micro_batch)
    finally:
        undo()


def parts(model: nn.Module, x: torch.Tensor, y: torch.Tensor, memory_bytes: int) -> int | None:
    """The parts in which the planner goes through the batch; None where it is one."""
    found = _once("parts", model, x, memory_bytes, lambda: by_planner(model, x, y, memory_bytes).micro_batch or len(x))
    return None if found == len(x) else found


def _prepare(choose: Chosen, memory_bytes: int) -> Prepare:
    def prepare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Trainee:
        plan = choose(model, x[:BATCH], y[:BATCH], memory_bytes)
        apply(model, plan)
        return Trainee(model, plan=plan)

    return prepare


def arms(memory_bytes: int) -> tuple[Arm, ...]:
    """The planner, and each method alone."""
    exact = Arm("exact", _prepare(partial(deepest, Exact()), memory_bytes), rates=RATES)
    others: dict[tuple[str, int | None], Chosen] = {
        ("planner", None): by_planner,
        ("pooled chain", 2): partial(deepest, PooledChain(patch_px=2)),
        ("pooled chain", 4): partial(deepest, PooledChain(patch_px=4)),
        ("sparse update", None): sparsest,
    }
    return (
        exact,
        *(
            Arm(name, _prepare(choose, memory_bytes), patch_px, rate_of=exact)
            for (name, patch_px), choose in others.items()
        ),
    )


CASES = tuple(
    Case(f"{name} in {budget} MiB", start, size, 3, None, RATES)
    for name, start, size in (("resnet20@32", RESNET20, 32), ("mobilenet_v2@96", IMAGENET_V2, 96))
    for budget in BUDGETS
)
ROWS = tuple((case, arm) for case, budget in zip(CASES, BUDGETS * 2, strict=True) for arm in arms(budget * MIB))


def study(bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
    """Accuracy of a cell; in the first of a row, the peak of a real step, and how many convolutions learn."""
    found = adapt(bench, arm, split, rate, seed)
    return found if seed else {**found, **_size(bench, arm, split)}


def _size(bench: Bench, arm: Arm, split: Split) -> Line:
    """Of the plan that the arm makes."""
    trainee, x = trainee_of(bench, arm, split[0], 0), bench.source().seen(split[0][:BATCH], 0)
    assert trainee.plan is not None
    learning = [name for name, roles in trainee.plan.learns.items() if "weight" in roles]
    return {
        "peak_bytes": measured_peak(trainee.model, x, micro_batch=trainee.plan.micro_batch),
        "micro_batch": trainee.plan.micro_batch or BATCH,
        "depth": len(learning),
    }


GRID = Grid(
    "budgets",
    CASES,
    ROWS,
    study=study,
    search=adapt,
    medians=("peak_bytes", "micro_batch", "depth"),
    baseline="planner",
)
summarise = GRID.summarise


def run(options: Options | None = None) -> dict[str, Any]:
    """Work through the cells that are not there yet, then summarise: {machine, versions, git, rows}."""
    return GRID.run(options or Options())
