"""The choice under a budget against trying everything; what it costs against what `profile` says of the plan."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import edgetune as et
from edgetune.errors import BudgetError, PlanError, RunError
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.models import load_model
from edgetune.profile import measure, profile
from edgetune.sparse import (
    Contributions,
    Trials,
    choose_sparse,
    fisher_contributions,
    measure_contributions,
    sparse_plan,
)
from edgetune.sparse.select import Option, best_update
from nets import NETS, scramble


def tried(depths: dict[int, Option], layers: list[list[Option]], capacity: int) -> float | None:
    """The best gain by going through all choices."""
    best: float | None = None
    for depth, (size, gain) in depths.items():
        for taken in itertools.product(*([(0, 0.0), *options] for options in layers[:depth])):
            if size + sum(s for s, _ in taken) <= capacity:
                best = max(gain + sum(g for _, g in taken), -float("inf") if best is None else best)
    return best


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    chance = random.Random(seed)
    whole = seed % 2 == 0  # whole numbers make many totals equal

    def option() -> Option:
        gain = chance.uniform(-1, 5)
        return chance.randint(0, 30), round(gain) if whole else gain

    layers = [[option() for _ in range(chance.randint(0, 3))] for _ in range(chance.randint(1, 5))]
    depths = {depth: option() for depth in range(len(layers) + 1) if depth == 0 or chance.random() < 0.7}
    capacity = chance.randint(0, 80)
    expected, found = tried(depths, layers, capacity), best_update(depths, layers, capacity)
    assert (found is None) == (expected is None)
    if found is not None:
        total, depth, taken = found
        used = [layers[i][option] for i, option in enumerate(taken) if option is not None]
        assert total == pytest.approx(expected)
        assert all(option is None for option in taken[depth:])
        assert total == pytest.approx(depths[depth][1] + sum(gain for _, gain in used))
        assert depths[depth][0] + sum(size for size, _ in used) <= capacity


def added(cost: et.Cost) -> int:
    return cost.kept_bytes + cost.grad_bytes + cost.optimizer_bytes


@pytest.mark.parametrize("name", ["mobilenet_v2_0.35", "resnet20", "mobilenet_v3_small"])
def test_a_budget_is_kept_and_used(name: str) -> None:
    torch.manual_seed(0)
    model, x = scramble(load_model(name, num_classes=5)), torch.randn(2, 3, 64, 64)
    graph = et.trace(model, x)
    table = fisher_contributions(model, graph, (x, torch.tensor([1, 4])))
    least = added(profile(model, x, sparse_plan(graph, 0, {}), graph=graph))
    plan = choose_sparse(model, x, table, 1 << 40, graph=graph)
    most, takes = added(profile(model, x, plan, graph=graph)), len(plan.layers)
    assert table.weight.keys() == {
        call.name for call in graph.layers("conv") if SparseUpdate(ratio=1.0).refuse(call) is None}
    total = sum(gains[1.0] for gains in table.weight.values())
    assert sum(table.weight[name][own.ratio] for name, (own,) in plan.layers.items()) == pytest.approx(total)
    for share in (0.02, 0.1, 0.4):
        budget = int(least + share * (most - least))
        plan = choose_sparse(model, x, table, budget, graph=graph)
        took = added(profile(model, x, plan, graph=graph))
        assert least + 0.8 * (budget - least) < took <= budget
        assert len(plan.layers) < takes
    et.apply(model, plan)
    assert added(measure(model, x, repeats=1)) == took
    with pytest.raises(BudgetError, match=f"{least} bytes"):
        choose_sparse(load_model(name, num_classes=5), x, table, least - 1)


def test_what_the_choice_counts_is_what_profile_says() -> None:
    """Where no two layers read one tensor the sum is exact: the budget just met is enough, one byte less is not."""
    torch.manual_seed(0)
    model, x = load_model("mobilenet_v2_0.35", num_classes=5), torch.randn(2, 3, 64, 64)
    graph = et.trace(model, x)
    names = [call.name for call in graph.layers("conv")]
    table = Contributions(origin="accuracy", bias={10: 1.0}, weight={names[44]: {0.25: 1.0}, names[46]: {0.5: 0.5}})
    wanted = sparse_plan(graph, 10, {44: 0.25, 46: 0.5})
    exact = added(profile(model, x, wanted, graph=graph))
    assert choose_sparse(model, x, table, exact).layers.keys() == wanted.layers.keys()
    assert choose_sparse(model, x, table, exact - 1).layers.keys() == {names[44]}


def small() -> tuple[torch.nn.Module, et.Graph, torch.Tensor, torch.Tensor]:
    torch.manual_seed(4)
    model, x = scramble(NETS["Inverted"]()).double().eval(), torch.randn(3, 3, 17, 15, dtype=torch.float64)
    return model, et.trace(model, x), x, torch.tensor([0, 3, 4])


def test_fisher_gains_are_squared_gradients_of_single_samples() -> None:
    model, graph, x, y = small()
    table = fisher_contributions(model, graph, (x, y), (0.25, 1.0))
    grads = [dict(zip(dict(model.named_parameters()), torch.autograd.grad(
        F.cross_entropy(model(x[i:i + 1]), y[i:i + 1]), list(model.parameters())), strict=True)) for i in range(3)]

    def information(name: str, part: tuple[slice, ...] = ()) -> float:
        return sum(float(g[name][part].square().sum()) for g in grads) / 3

    assert "even" not in table.weight  # grouped
    for name, size, axis in (("expand.0", 2, 1), ("depth.0", 3, 0), ("fc1", 3, 1)):
        norms = [float(model.get_parameter(f"{name}.weight").detach().narrow(axis, f, size).norm()) for f in range(
            model.get_parameter(f"{name}.weight").shape[axis] - size + 1)]
        first = norms.index(max(norms))
        part = (slice(None),) * axis + (slice(first, first + size),)
        assert table.weight[name][0.25] == pytest.approx(information(f"{name}.weight", part))
        assert table.weight[name][1.0] == pytest.approx(information(f"{name}.weight"))
    biases = ["project.0.bias", "project.1.bias"]
    assert table.bias[1] == 0.0  # the last convolution, `even`, has none
    assert table.bias[2] == pytest.approx(sum(map(information, biases)))
    assert table.bias[len(graph.layers("conv"))] == pytest.approx(sum(
        information(name) for name, _ in model.named_parameters() if name.endswith("bias") and "head" not in name))


def test_gains_by_cost_favour_small_layers() -> None:
    model, graph, x, y = small()
    plain, by_cost = (fisher_contributions(model, graph, (x, y), (1.0,), per_cost=own) for own in (False, True))
    convs = {call.name: call for call in graph.layers("conv") if call.name in plain.weight}
    size = {name: torch.Size(call.param_shapes["weight"]).numel() for name, call in convs.items()}
    macs = {name: call.macs for name, call in convs.items()}
    for name in convs:
        cost = size[name] * macs[name] / max(size.values()) / max(macs.values())
        assert by_cost.weight[name][1.0] == pytest.approx(plain.weight[name][1.0] / cost)
    assert by_cost.bias == plain.bias


def test_measured_gains_are_differences_and_survive_a_stop(tmp_path: Path) -> None:
    model, graph, _, _ = small()
    runs: list[et.Plan] = []

    def accuracy(plan: et.Plan) -> float:
        if len(runs) == 4:
            raise KeyboardInterrupt
        runs.append(plan)
        shares = {name: own.ratio for name, (own,) in plan.layers.items()}
        return 50 + 3 * sum("bias" in roles for roles in plan.learns.values()) + 10 * sum(shares.values())

    file, told = tmp_path / "trials.json", []
    options = {"depths": (1, 3), "ratios": (0.25, 1.0), "progress": lambda *news: told.append(news)}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            measure_contributions(model, graph, accuracy, file, **options)
    assert len(Trials.load(file).accuracy) == 4
    runs.clear()
    table = None
    while table is None:
        try:
            table = measure_contributions(model, graph, accuracy, file, **options)
        except KeyboardInterrupt:
            runs.clear()
    assert table.bias == {1: 0.0, 3: 6.0 + 3.0}
    assert {name: {r: pytest.approx(10 * r) for r in gains} for name, gains in table.weight.items()} == table.weight
    assert table.weight.keys() == {"project.0", "fc2"} and told[-1][1:] == (6, 7)
    table.save(tmp_path / "table.json")
    assert Contributions.load(tmp_path / "table.json") == table
    file.write_text("{}}")
    with pytest.raises(RunError, match=r"trials\.json"):
        measure_contributions(model, graph, accuracy, file)
    with pytest.raises(PlanError, match="at least one"):
        measure_contributions(model, graph, accuracy, tmp_path / "new.json", depths=())
