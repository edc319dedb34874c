"""The planner: never over its budget, clear where nothing fits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune.errors import BudgetError, PlanError
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.plan import Budget, last_layers, plan
from edgetune.profile import measure, profile
from nets import NETS, scramble


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return scramble(NETS["Inverted"]()), torch.randn(16, 3, 32, 32), torch.arange(16) % 5


@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_plans_hold_their_budget_when_measured(case: tuple[nn.Module, torch.Tensor, torch.Tensor],
                                               share: float) -> None:
    model, x, y = case
    budget = int(profile(model, x).peak_bytes * share)
    made = plan(model, x, Budget(memory_bytes=budget), (x, y))
    twin = copy.deepcopy(model)
    et.apply(twin, made)
    assert measure(twin, x, y, micro_batch=made.micro_batch, repeats=1).peak_bytes <= budget
    assert made.learns


def test_more_memory_never_learns_less(case: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = case
    head = profile(model, x[:1], last_layers(et.trace(model, x), 0, Exact())).peak_bytes
    counts = [len(plan(model, x, Budget(memory_bytes=int(head * share)), (x, y)).learned()) for share in (1.3, 3, 90)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_without_a_budget_everything_learns_exactly(case: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = case
    made = plan(model, x, Budget(), (x, y))
    assert {type(stack[0]) for stack in made.layers.values()} == {Exact} and made.micro_batch is None


def test_an_impossible_budget_says_the_smallest_that_works(case: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = case
    with pytest.raises(BudgetError, match=r"smallest budget that works here is .*\((\d+) bytes\)") as refused:
        plan(model, x, Budget(memory_bytes=64), (x, y))
    smallest = int(str(refused.value).rpartition("(")[2].split()[0])
    assert plan(model, x, Budget(memory_bytes=smallest), (x, y)).learns


def test_time_budgets_freeze_from_the_input_on(case: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = case
    assert plan(model, x, Budget(step_ms=1e9), (x, y)).learned() == plan(model, x, Budget(), (x, y)).learned()
    with pytest.raises(BudgetError, match="even when only the head learns"):
        plan(model, x, Budget(step_ms=1e-9), (x, y))


def test_planning_leaves_the_model_untouched(case: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = {id(m): set(m.__dict__) for m in model.modules()}
    plan(model, x, Budget(memory_bytes=10**6), (x, y))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {id(m): set(m.__dict__) for m in model.modules()} == names
    assert all(p.grad is None for p in model.parameters())


def test_last_layers_counts_convolutions(case: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, _ = case
    graph = et.trace(model, x)
    made = last_layers(graph, 2, PooledChain(patch_px=4))
    assert list(made.layers) == ["project.0", "even"] and made.learns["project.1"] == ("bias",)
    assert "head.2" in made.learns and "stem.1" not in made.learns
    assert last_layers(graph, 2, Exact(), scales=True).learns["project.1"] == ("weight", "bias")
    with pytest.raises(PlanError, match="at most 7"):
        last_layers(graph, 8, Exact())
