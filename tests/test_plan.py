"""The planner: never over its budget, clear where nothing fits."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import edgetune as et
from edgetune import prospect
from edgetune.contract import KeptMethod
from edgetune.errors import BudgetError, PlanError
from edgetune.knapsack import total_of
from edgetune.methods.backward.checkpoint import Checkpoint
from edgetune.methods.backward.comet import COMET
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.low_bit import LowBit
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.plan import Budget, Planner, best, last_layers, plan
from edgetune.profile import measure, profile
from macs import times_that_count_macs
from nets import NETS, block, scramble


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
    with pytest.raises(BudgetError) as refused:
        plan(model, x, Budget(memory_bytes=64), (x, y))
    head = int(str(refused.value).rpartition("(")[2].split()[0])
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


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    """A planner whose clock counts multiply-accumulates."""
    torch.manual_seed(3)
    with times_that_count_macs(tmp_path_factory.mktemp("cache")):
        # kernels of one tap, which filtered gradients follow well
        model = nn.Sequential(block(3, 6), block(6, 8, 1, stride=2), block(8, 8, 1), block(8, 8, 1, groups=4),
                              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        yield Planner(scramble(model), torch.randn(8, 3, 16, 16), methods=(Exact(), PooledChain(patch_px=2)))


def between(planner: Planner, share: float) -> float:
    """A step time between that of the head alone and that of everything exact."""
    head = planner.head_ms(8)
    return head + share * (planner.prospect.measured_ms(planner.plan(Budget())) - head)


def test_time_budgets_hold_and_more_time_never_gains_less(planner: Planner) -> None:
    gains = []
    for share in (0.05, 0.25, 0.5, 1.1):
        step_ms = between(planner, share)
        found = planner.find(Budget(step_ms=step_ms))
        assert planner.prospect.measured_ms(found.made) <= step_ms
        gains.append(found.total.gain)
    assert gains == sorted(gains) and 0 < gains[1] < gains[-1]
    assert gains[-1] == pytest.approx(planner.prospect.most_gain)


def test_time_chooses_cheaper_methods_before_it_freezes(planner: Planner) -> None:
    """What freezing from the input on would leave of the unhurried plan gains less."""
    step_ms, unhurried = between(planner, 0.5), planner.find(Budget())
    choices = planner.prospect.choices(8, timed=True)
    frozen = [total_of(choices, [None] * depth + list(unhurried.picked[depth:])) for depth in range(4)]
    left = max(total.gain for total in frozen if total.ms <= step_ms - planner.head_ms(8))
    found = planner.find(Budget(step_ms=step_ms))
    assert found.total.gain > left
    assert PooledChain in {type(stack[0]) for stack in found.made.layers.values()}


def test_both_budgets_hold(planner: Planner) -> None:
    prospect = planner.prospect
    peak, step_ms = prospect.measured_peak(planner.plan(Budget())), between(planner, 0.6)
    made = planner.plan(Budget(memory_bytes=int(0.7 * peak), step_ms=step_ms))
    assert prospect.measured_peak(made) <= 0.7 * peak and prospect.measured_ms(made) <= step_ms
    assert any("weight" in roles for layer, roles in made.learns.items() if layer in made.layers)


@pytest.mark.parametrize("slower", [0.3, 3.0, 1e6])
def test_a_step_that_takes_other_than_its_layers_has_the_last_word(planner: Planner, slower: float,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    head, step_ms, real = planner.head_ms(8), between(planner, 0.5), planner.prospect.measured_ms
    expected = planner.find(Budget(step_ms=step_ms)).total.gain

    def measured_ms(made: et.Plan) -> float:
        return head + slower * (real(made) - head)

    monkeypatch.setattr(planner.prospect, "measured_ms", measured_ms)
    found = planner.find(Budget(step_ms=step_ms))
    assert measured_ms(found.made) <= step_ms
    assert found.total.gain > expected if slower < 1 else found.total.gain < expected
    assert slower < 1e3 or found.made == planner.prospect.nothing(8).made


def test_an_impossible_time_says_the_smallest_that_works(planner: Planner) -> None:
    with pytest.raises(BudgetError, match=r"smallest step time that works here is .*\(([\d.]+) ms\)") as refused:
        planner.plan(Budget(step_ms=1e-3))
    smallest = float(str(refused.value).rpartition("(")[2].split()[0])
    assert planner.plan(Budget(step_ms=smallest)).learns
    with pytest.raises(BudgetError, match="even when only the head learns"):
        planner.plan(Budget(memory_bytes=2**30, step_ms=1e-3))


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


def test_a_limit_that_does_not_bind_changes_nothing(planner: Planner) -> None:
    spare_ms = between(planner, 0.5) - planner.head_ms(8)
    assert planner.fill(2**40, spare_ms, 8) == planner.fill(None, spare_ms, 8)
    assert planner.fill(2**40, None, 8) == planner.fill(None, None, 8)


def test_both_limits_take_few_predictions_and_no_question_twice(planner: Planner,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass on meta is what planning of a deep network consists of."""
    asked: list[str] = []
    real = prospect.predicted_peak

    def predicted_peak(model: nn.Module, sample: torch.Tensor, made: et.Plan, *rest: Any, **options: Any) -> int:
        asked.append(made.model_dump_json())
        return real(model, sample, made, *rest, **options)

    monkeypatch.setattr(prospect, "predicted_peak", predicted_peak)
    monkeypatch.setattr(planner.prospect, "_peaks", {})
    peak = planner.prospect.measured_peak(planner.plan(Budget()))
    for share, budget in ((0.9, 0.9), (0.5, 0.5), (0.9, 0.5)):
        asked.clear()
        planner.find(Budget(memory_bytes=int(share * peak), step_ms=between(planner, budget)))
        assert len(asked) == len(set(asked)) <= 6


@pytest.mark.parametrize("hold", [*LowBit.choices(), *COMET.choices()], ids=lambda own: own.label)
def test_plans_that_hold_what_they_keep_hold_their_budget_on_any_data(hold: KeptMethod) -> None:
    """Noise is less compressible than what the plan was made for."""
    model, x, y = scramble(NETS["Residual"]()), torch.zeros(16, 3, 32, 32), torch.arange(16) % 5
    x[:, :, 8:12, 8:12] = torch.randn(16, 3, 4, 4)
    budget = int(0.5 * profile(model, x).peak_bytes)
    made = Planner(model, x, (x, y), hold=hold).plan(Budget(memory_bytes=budget))
    assert any(hold in stack for stack in made.layers.values())
    et.apply(model, made)
    for data in (x, 100 * torch.randn(x.shape)):
        assert measure(model, data, y, micro_batch=made.micro_batch, repeats=1).peak_bytes <= budget


def test_what_is_held_is_weighed_against_what_is_not() -> None:
    model, x, y = scramble(NETS["Residual"]()), torch.randn(16, 3, 64, 64), torch.arange(16) % 5
    planners = [Planner(model, x, (x, y), hold=hold) for hold in (None, *LowBit.choices())]
    budgets = [Budget(memory_bytes=int(share * profile(model, x[:1]).peak_bytes)) for share in (0.6, 20)]
    for budget in budgets:
        planner, found = best(planners, budget)
        assert found.total.gain == max(each.find(budget).total.gain for each in planners)
        assert found.made == planner.plan(budget)
    assert best(planners, budgets[1])[0] is planners[0]


def test_methods_of_whole_runs_hold_what_they_keep(case: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = case
    held = Planner(model, x, (x, y), methods=(Exact(), PooledChain(patch_px=2)), hold=LowBit())
    assert held.prospect.methods == (Exact(),)


def test_with_stretches_that_run_again_more_learns_in_the_same_memory() -> None:
    model, x, y = scramble(NETS["Residual"]()), torch.randn(4, 3, 64, 64), torch.arange(4) % 5
    peak = profile(model, x[:1]).peak_bytes
    planner, other = Planner(model, x, (x, y), recompute=True), Planner(model, x, (x, y))
    more: dict[float, bool] = {}
    for share in (0.65, 0.7, 0.75, 0.8, 0.85, 1.5):  # where it helps depends on what the machine's products take
        budget = Budget(memory_bytes=int(share * peak))
        found, without = planner.find(budget), other.find(budget)
        assert found.total.gain >= without.total.gain
        again = any(isinstance(own, Checkpoint) for stack in found.made.layers.values() for own in stack)
        assert again == (found.total.gain > without.total.gain)
        twin, more[share] = copy.deepcopy(model), again
        et.apply(twin, found.made)
        assert measure(twin, x, y, micro_batch=found.made.micro_batch, repeats=1).peak_bytes <= int(share * peak)
    assert any(more.values()) and not more[1.5]



def test_a_plan_that_fits_runs_nothing_again(case: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> None:
    model, x, y = case
    budget = Budget(memory_bytes=4 * profile(model, x).peak_bytes)
    assert plan(model, x, budget, (x, y), recompute=True) == plan(model, x, budget, (x, y))
