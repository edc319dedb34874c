"""Plans of one method beside the planner's: each holds its memory, and none leaves room for more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgetune.bench import budgets
from edgetune.bench.adapt import trainee_of
from edgetune.bench.cases import DIGITS_NET, Bench, Case
from edgetune.bench.grid import Grid, GridOptions
from edgetune.draft import last_layers
from edgetune.graph import trace
from edgetune.methods.backward.exact import Exact

MEMORY = 4 * 2**20
CASE = Case("digits in 4 MiB", DIGITS_NET, 32, 2, None, (0.01,))
BENCH = Bench(CASE, "", quick=True)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "_KNOWN", {})
    monkeypatch.setattr(budgets, "SHARES", 4)


def test_every_arm_holds_the_memory() -> None:
    split = BENCH.photos().splits[0]
    found = {(a.method, a.patch_px): budgets._size(BENCH, a, split) for a in budgets.arms(MEMORY)}
    assert all(0 < line["peak_bytes"] <= MEMORY for line in found.values())
    assert len({line["micro_batch"] for line in found.values()}) == 1
    assert found["pooled chain", 4]["depth"] >= found["exact", None]["depth"] > 1


def test_one_layer_more_would_not_fit() -> None:
    split = BENCH.photos().splits[0]
    exact = budgets.arms(MEMORY)[0]
    plan = trainee_of(BENCH, exact, split[0], 0).plan
    assert plan is not None
    model, x = BENCH.network(0), BENCH.photos().seen(split[0][: budgets.BATCH], 0)
    graph = trace(model, x)
    count = sum(call.name in plan.layers for call in graph.layers("conv"))
    if count < len(graph.layers("conv")):
        more = last_layers(graph, count + 1, Exact()).model_copy(update={"micro_batch": plan.micro_batch})
        assert budgets.peak(model, x, more, graph) > MEMORY
    assert budgets.peak(model, x, plan, graph) <= MEMORY
    assert all(p.requires_grad for p in model.parameters())  # measuring leaves nothing behind


def test_what_is_known_of_one_fold_is_not_searched_again() -> None:
    asked: list[int] = []
    for _ in range(2):
        budgets._once("depth", torch.nn.ReLU(), torch.zeros(2, 3), 8, lambda: asked.append(1) or 5)
    budgets._once("depth", torch.nn.ReLU(), torch.zeros(2, 3), 9, lambda: asked.append(1) or 5)
    assert len(asked) == 2


def test_rows_compare_with_the_planner(tmp_path: Path) -> None:
    arms = tuple(a for a in budgets.arms(MEMORY) if a.method in ("exact", "planner"))
    grid = Grid(
        "budgets",
        (CASE,),
        tuple((CASE, a) for a in arms),
        study=budgets.study,
        search=budgets.adapt,
        medians=budgets.GRID.medians,
        baseline="planner",
    )
    rows = {row["method"]: row for row in grid.run(GridOptions(out=str(tmp_path / "b.jsonl"), quick=True))["rows"]}
    assert "accuracy_difference" not in rows["planner"] and rows["exact"]["seeds"] == len(BENCH.photos().splits)
    difference = rows["exact"]["accuracy_mean"] - rows["planner"]["accuracy_mean"]
    assert rows["exact"]["accuracy_difference"] == pytest.approx(difference)
    assert rows["exact"]["peak_bytes"] <= MEMORY


def test_the_grid_has_every_budget_and_a_planner_in_each() -> None:
    assert {arm.method for case, arm in budgets.ROWS if case == budgets.CASES[0]} == {
        "exact",
        "planner",
        "pooled chain",
        "sparse update",
    }
    assert all(budgets.GRID.plain(case).method == "planner" for case in budgets.CASES)
    assert len(budgets.CASES) == 6 and not any("," in case.name for case in budgets.CASES)
