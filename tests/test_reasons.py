"""What is told of a plan: the reasons layer by layer, and what other budgets would bring."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from edgetune.front import Front, front
from edgetune.knapsack import total_of
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.plan import Budget, Planner
from edgetune.prospect import Found
from edgetune.reasons import Reasons, explain
from macs import times_that_count_macs
from nets import block, scramble

METHODS = (Exact(), PooledChain(patch_px=2))


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Planner]:
    """A planner whose clock counts multiply-accumulates."""
    torch.manual_seed(3)
    with times_that_count_macs(tmp_path_factory.mktemp("cache")):
        model = nn.Sequential(block(3, 6), block(6, 8, stride=2), block(8, 8), block(8, 6),
                              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
        yield Planner(scramble(model), torch.randn(8, 3, 16, 16), methods=METHODS)


def partly(planner: Planner, bytes_share: float = 0.5, ms_share: float = 0.5) -> Found:
    """A choice under both limits, solved without trying a step."""
    whole = planner.prospect.solve(None, None, 8, timed=True).total
    return planner.prospect.solve(bytes_share * whole.weight_bytes, ms_share * whole.ms, 8)


def test_numbers_are_those_that_the_choice_was_made_by(planner: Planner) -> None:
    found = partly(planner)
    told = explain(planner, found, bytes_limited=True, ms_limited=True)
    choices = planner.prospect.choices(8, timed=True)
    assert sum(reason.importance for reason in told.layers) == pytest.approx(1)
    assert told.benefit == pytest.approx(found.total.gain / planner.prospect.most_gain)
    for index, reason in enumerate(told.layers):
        assert [way.method for way in reason.ways] == ["exact", "pooled_chain"]
        assert [(way.memory_bytes, way.ms) for way in reason.ways] == [(c.weight_bytes, c.ms)
                                                                       for c in choices[index][:2]]
        assert reason.ways[0].fidelity == pytest.approx(1) and reason.ways[1].fidelity <= 1
        picked = found.picked[index]
        assert (reason.way, reason.learns) == ((None, False) if picked is None else (picked % 2, picked < 2))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_choosing_otherwise_costs_what_it_says(planner: Planner, share: float) -> None:
    """Every alternative is rebuilt by hand from its words, and summed anew; none is better for nothing."""
    found = partly(planner, share, 1.0)
    choices = planner.prospect.choices(8, timed=True)
    first = next((i for i, pick in enumerate(found.picked) if pick is not None), 4)
    for index, reason in enumerate(explain(planner, found, bytes_limited=True, ms_limited=True).layers):
        other, picked = reason.otherwise, list(found.picked)
        assert other is not None
        if other.way is None:
            picked[:index + 1] = [None] * (index + 1)
            while (head := next((i for i, p in enumerate(picked) if p is not None), None)) is not None \
                    and not choices[head][picked[head]].learns:
                picked[head] = None
        else:
            pick = other.way + (0 if other.learns else 2)
            picked[index:max(index + 1, first)] = [pick] * (max(index + 1, first) - index)
        assert picked != list(found.picked)
        then = total_of(choices, picked)
        assert other.benefit == pytest.approx((then.gain - found.total.gain) / planner.prospect.most_gain)
        assert other.memory_bytes == then.weight_bytes - found.total.weight_bytes
        assert other.ms == pytest.approx(then.ms - found.total.ms)
        assert other.benefit <= 1e-9 or other.memory_bytes > 0 or (other.ms or 0) > 0


def test_prices_are_told_where_there_is_a_limit_and_vanish_where_it_does_not_bind(planner: Planner) -> None:
    tight = explain(planner, partly(planner, 0.4, 1.0), bytes_limited=True, ms_limited=False)
    assert tight.benefit_per_byte is not None and tight.benefit_per_byte > 0 and tight.benefit_per_ms is None
    assert all(way.ms is None for reason in tight.layers for way in reason.ways)
    whole = planner.prospect.solve(None, None, 8)
    free = explain(planner, whole, bytes_limited=False, ms_limited=False)
    assert (free.benefit_per_byte, free.benefit_per_ms) == (None, None) and free.benefit == pytest.approx(1)
    assert Reasons.model_validate_json(tight.model_dump_json()) == tight


def test_the_front_rises_and_ends_with_everything(planner: Planner) -> None:
    found = planner.find(Budget())
    told = front(planner, Budget(), found, points=5)
    for points, cost in ((told.by_memory, "memory_bytes"), (told.by_time, "step_ms")):
        costs, benefits = [getattr(point, cost) for point in points], [point.benefit for point in points]
        assert len(points) > 2 and costs == sorted(costs) and benefits == sorted(set(benefits))
        assert benefits[0] == 0 and benefits[-1] == pytest.approx(1)
        assert points[0].learning == 0 and points[-1].learning == 4
    assert told.chosen is not None and told.chosen.benefit == pytest.approx(1)
    assert Front.model_validate_json(told.model_dump_json()) == told


def test_the_front_in_time_keeps_to_the_memory(planner: Planner) -> None:
    peak = planner.prospect.predicted_peak(planner.find(Budget()).made, 8)
    told = front(planner, Budget(memory_bytes=int(0.6 * peak)), points=4)
    assert told.chosen is None and told.by_time
    assert all(point.memory_bytes <= 0.6 * peak for point in told.by_time)
