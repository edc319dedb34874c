"""The planner's search: as good as trying everything, within both capacities, never worse than freezing in time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.knapsack import Choice, best_choices, total_of

shares = st.sampled_from([0.0, 0.25, 0.5, 1.0])
choices = st.lists(st.builds(Choice, st.integers(0, 40), st.integers(0, 20).map(float), shares, st.booleans(),
                             st.integers(4, 30).map(float), st.integers(0, 4).map(float)), min_size=1, max_size=3)
nets = st.lists(choices, min_size=1, max_size=5).map(
    lambda layers: [[c if c.learns else replace(c, gain=0.0) for c in own] for own in layers])


def everything(layers: list[list[Choice]]) -> list[list[Choice | None]]:
    """Every combination of choices at every depth: what is frozen is None, the first that is not learns."""
    return [[*[None] * depth, *combination] for depth in range(len(layers))
            for combination in itertools.product(*layers[depth:]) if combination[0].learns]


def sums(taken: list[Choice | None]) -> tuple[float, int, float]:
    """Gain (each times what the layers behind it let pass), bytes and ms, the slow way."""
    gain, weight, ms = 0.0, 0, 0.0
    for at, choice in enumerate(taken):
        if choice is not None:
            through = 1.0
            for behind in taken[at + 1:]:
                assert behind is not None
                through *= behind.passes
            gain += choice.gain * through
            weight += choice.weight_bytes
            ms += choice.first_ms if at == 0 or taken[at - 1] is None else choice.ms
    return gain, weight, ms


def taken(layers: list[list[Choice]], picked: list[int | None]) -> list[Choice | None]:
    return [None if pick is None else layer[pick] for layer, pick in zip(layers, picked, strict=True)]


def check_form(layers: list[list[Choice]], picked: list[int | None]) -> None:
    """Frozen in front, chosen behind, and the first that is chosen learns."""
    behind = [choice for choice in taken(layers, picked) if choice is not None]
    assert [pick is not None for pick in picked] == sorted(pick is not None for pick in picked)
    assert not behind or behind[0].learns


@settings(max_examples=300)
@given(nets, st.none() | st.integers(0, 100), st.none() | st.integers(0, 60))
def test_as_good_as_trying_everything(layers: list[list[Choice]], room: int | None, time: int | None) -> None:
    """With cells of one byte and one millisecond nothing is lost by cutting the plane of costs into cells."""
    gain, picked = best_choices(layers, room, time, cells=((room or 0) + 1, (time or 0) + 1))
    best = max((g for g, weight, ms in map(sums, everything(layers))
                if (room is None or weight <= room) and (time is None or ms <= time)), default=0.0)
    found, weight, ms = sums(taken(layers, picked))
    assert gain == pytest.approx(max(best, 0.0)) and found == pytest.approx(gain)
    assert (room is None or weight <= room) and (time is None or ms <= time)
    check_form(layers, picked)


@given(nets)
def test_totals_are_those_of_the_slow_sum(layers: list[list[Choice]]) -> None:
    for combination in everything(layers)[:20]:
        picked = [None if c is None else layer.index(c) for c, layer in zip(combination, layers, strict=True)]
        total = total_of(layers, picked)
        gain, weight, ms = sums(combination)
        assert total.gain == pytest.approx(gain) and (total.weight_bytes, total.ms) == (weight, ms)


fine = st.floats(0, 10)
floats = st.lists(st.lists(st.builds(Choice, st.integers(0, 10**7), fine, st.floats(0, 1), st.just(True),
                                     st.floats(2, 9), st.floats(0, 2)), min_size=1, max_size=4),
                  min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(floats, st.none() | st.integers(1, 10**8), st.floats(0.0, 60), st.sampled_from([(2048, 1), (8, 8), (256, 128)]))
def test_coarse_cells_exceed_nothing_and_beat_freezing_from_the_input_on(
        layers: list[list[Choice]], room: int | None, time: float, cells: tuple[int, int]) -> None:
    gain, picked = best_choices(layers, room, time, cells=cells)
    found, weight, ms = sums(taken(layers, picked))
    assert found == pytest.approx(gain) and ms <= time * (1 + 1e-9) and (room is None or weight <= room)
    check_form(layers, picked)
    _, unhurried = best_choices(layers, room)
    for depth in range(len(layers)):
        frozen, _, takes = sums(taken(layers, [*[None] * depth, *unhurried[depth:]]))
        assert takes > time or gain >= frozen - 1e-9


@given(st.integers(1, 10**9))
def test_capacity_is_never_exceeded_by_rounding(capacity: int) -> None:
    layers = [[Choice(capacity // 3 + 1, 1.0), Choice(7, 0.0, 1.0, learns=False)] for _ in range(4)]
    _, picked = best_choices(layers, capacity, cells=(64, 1))
    assert sums(taken(layers, picked))[1] <= capacity


def test_no_layers_gain_nothing() -> None:
    assert best_choices([], 100, 1.0) == (0.0, [])
