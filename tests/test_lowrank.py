"""Ranks under a budget: the exact choice against trying everything, candidates against what runs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgetune as et
from edgetune.errors import BudgetError, PlanError
from edgetune.hosts.conv import weight_gradient
from edgetune.hosts.tucker import AXES, truncated_hosvd
from edgetune.lowrank import ENERGIES, Candidate, choose_ranks, least_error, rank_candidates
from edgetune.methods.backward.asi import ASI
from edgetune.plan import last_layers
from nets import NETS, scramble

LAYERS = st.lists(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=4), min_size=1,
                  max_size=4)


def network(name: str = "Residual") -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return scramble(NETS[name]()).eval(), (torch.randn(6, 3, 16, 16), torch.arange(6) % 5)


@settings(max_examples=150)
@given(LAYERS, st.integers(0, 50))
def test_the_choice_is_the_best_of_all(layers: list[list[tuple[int, int]]], budget: int) -> None:
    candidates = [[Candidate((1, 1, 1, 1), size, error) for size, error in layer] for layer in layers]
    every = [sum(each.error for each in chosen) for chosen in itertools.product(*candidates)
             if sum(each.kept_bytes for each in chosen) <= budget]
    taken = least_error(candidates, budget)
    assert (taken is None) == (not every)
    if taken is not None:
        chosen = [layer[at] for layer, at in zip(candidates, taken, strict=True)]
        assert sum(each.kept_bytes for each in chosen) <= budget
        assert sum(each.error for each in chosen) == min(every)


def test_candidates_err_as_whole_maps_rebuilt_do() -> None:
    model, (x, y) = network()
    graph = et.trace(model, x)
    call = graph.layers("conv")[-1]
    assert call.geometry is not None
    seen: dict[str, torch.Tensor] = {}

    def look(module: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        seen["x"] = args[0].detach().clone()
        out.register_hook(lambda g: seen.update(gy=g.clone()))

    handle = model.get_submodule(call.name).register_forward_hook(look)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    handle.remove()
    exact = weight_gradient(seen["x"], seen["gy"], call.geometry)
    found = rank_candidates(model, graph, (x, y), [call.name])[call.name]
    for energy, candidate in zip(ENERGIES, found, strict=False):
        factors = truncated_hosvd(seen["x"], energy)
        near = weight_gradient(factors.grown(*AXES), seen["gy"], call.geometry)
        assert candidate.ranks == factors.core.shape
        assert candidate.error == pytest.approx(float((near - exact).norm()), rel=1e-3)
    assert found[-1].error == 0 and found[-1].kept_bytes == 4 * seen["x"].numel()
    assert [each.kept_bytes for each in found] == sorted(each.kept_bytes for each in found)


@pytest.mark.parametrize("net", ["Residual", "Inverted", "Stacked"])
def test_the_plan_keeps_what_it_says_and_fits_the_budget(net: str) -> None:
    model, batch = network(net)
    layers = list(last_layers(et.trace(model, batch[0]), 3, ASI()).layers)
    whole = sum(found[-1].kept_bytes for found in
                rank_candidates(model, et.trace(model, batch[0]), batch, layers).values())
    before = [p.clone() for p in model.parameters()]
    plan = choose_ranks(model, batch, whole // 3, last=3)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert list(plan.layers) == layers
    et.apply(model, plan)
    kept = {row.name: row.kept_bytes for row in et.measure(model, *batch, repeats=1).layers}
    assert 0 < sum(kept[name] for name in layers) <= whole // 3


def test_more_memory_never_errs_more_and_all_of_it_is_exact() -> None:
    model, batch = network()
    graph = et.trace(model, batch[0])
    layers = list(last_layers(graph, 4, ASI()).layers)
    candidates = list(rank_candidates(model, graph, batch, layers).values())
    errors = []
    for share in (0.2, 0.3, 0.5, 1.0):
        taken = least_error(candidates, int(share * sum(layer[-1].kept_bytes for layer in candidates)))
        assert taken is not None
        errors.append(sum(layer[at].error for layer, at in zip(candidates, taken, strict=True)))
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1] == 0


def test_too_small_a_budget_is_refused_with_one_that_works() -> None:
    model, batch = network()
    with pytest.raises(BudgetError, match="smallest budget that works here is") as refused:
        choose_ranks(model, batch, 16, last=3)
    smallest = int(str(refused.value).rpartition("(")[2].partition(" bytes")[0])
    choose_ranks(model, batch, smallest, last=3)
    with pytest.raises(BudgetError):
        choose_ranks(model, batch, smallest - 1, last=3)


def test_layers_that_cannot_be_looked_at_are_refused_by_name() -> None:
    model, batch = network("Opaque")
    with pytest.raises(PlanError, match=r"middle\.conv"):
        choose_ranks(model, batch, 10**6)
