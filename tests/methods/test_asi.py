"""ASI: fixed ranks, bases that follow the data from step to step, batches and maps of any size."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import edgetune as et
from edgetune.graph import Call
from edgetune.hosts.conv import weight_gradient
from edgetune.hosts.tucker import AXES, Tucker, truncated_hosvd, tucker_size, unfolded
from edgetune.methods.backward.asi import ASI
from edgetune.overlap import ConvGeometry
from edgetune.plan import last_layers
from geometries import geometries, operands
from methods.test_hosvd import smooth
from nets import NETS, scramble

POINT = ConvGeometry(in_channels=24, out_channels=8, groups=1, in_hw=(9, 9), kernel=(1, 1), stride=(1, 1),
                     dilation=(1, 1), pads=(0, 0, 0, 0))


def call_of(geometry: ConvGeometry, batch: int) -> Call:
    return Call(name="c", node="c", kind="conv", function="conv2d", geometry=geometry,
                in_shapes=((batch, geometry.in_channels, *geometry.in_hw),))


def kept_by(method: ASI, x: torch.Tensor, geometry: ConvGeometry, state: dict[str, torch.Tensor]) -> Tucker:
    kept = method.keep(x, geometry, state)
    assert isinstance(kept, dict)
    return Tucker.of(kept)


@settings(max_examples=60)
@given(geometries(), st.integers(1, 4))
def test_full_ranks_are_the_exact_gradient(geometry: ConvGeometry, batch: int) -> None:
    x, _, gy = operands(geometry, batch)
    method = ASI(shares=(1, 1, 1, 1))
    state = method.state_of(call_of(geometry, batch))
    assert method.ranks_on(x.shape) is None
    found = method.grad_weight(method.keep(x, geometry, state), gy, geometry)
    assert torch.allclose(found, weight_gradient(x, gy, geometry), atol=1e-9)


@settings(max_examples=80)
@given(geometries(), st.integers(1, 5), st.tuples(*[st.integers(1, 6)] * 4))
def test_the_gradient_is_that_of_x_projected_and_kept_has_the_size_it_says(
        geometry: ConvGeometry, batch: int, ranks: tuple[int, int, int, int]) -> None:
    x, _, gy = operands(geometry, batch)
    method = ASI(ranks=ranks)
    factors = kept_by(method, x, geometry, method.state_of(call_of(geometry, batch)))
    projected = x
    for axis, name in enumerate(AXES):
        if name in factors.bases:
            basis = factors.bases[name]
            assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[1], dtype=x.dtype), atol=1e-8)
            projected = torch.movedim(torch.tensordot(basis @ basis.mT, projected, ([1], [axis])), 0, axis)
    assert torch.allclose(factors.grown(*AXES), projected, atol=1e-9)
    found = method.grad_weight(factors.kept(), gy, geometry)
    assert torch.allclose(found, weight_gradient(projected, gy, geometry), atol=1e-8)
    fixed = method.ranks_on(x.shape)
    assert factors.numel == (x.numel() if fixed is None else tucker_size(x.shape, fixed))
    assert factors.numel <= x.numel()


def test_a_repeated_batch_comes_to_the_subspaces_of_the_decomposition() -> None:
    x, method = smooth(8, 24, 9, 9, torch.float64), ASI(ranks=(3, 3, 3, 3))
    state = {role: tensor.double() for role, tensor in method.state_of(call_of(POINT, 8)).items()}
    lost = []
    for _ in range(12):
        factors = kept_by(method, x, POINT, state)
        lost.append(float((x - factors.grown(*AXES)).norm() / x.norm()))
    best = truncated_hosvd(x, 1.0, (3, 3, 3, 3))
    assert lost[-1] < 1.01 * float((x - best.grown(*AXES)).norm() / x.norm())
    assert lost[0] > 1.05 * lost[-1]
    leading = torch.linalg.svd(unfolded(x, 1), full_matrices=False).U[:, :3]  # of the axis that goes first
    assert torch.allclose(factors.bases["c"] @ factors.bases["c"].mT, leading @ leading.mT, atol=1e-4)


def test_a_rank_that_the_others_cannot_use_costs_nothing_and_is_followed() -> None:
    x, given, fit = smooth(8, 24, 9, 9), ASI(ranks=(8, 1, 2, 1)), ASI(ranks=(2, 1, 2, 1))
    assert given.ranks_on(x.shape) == fit.ranks_on(x.shape) == (2, 1, 2, 1)
    states = [method.state_of(call_of(POINT, 8)) for method in (given, fit)]
    for _ in range(3):
        one, two = (kept_by(method, x, POINT, state) for method, state in zip((given, fit), states, strict=True))
    assert all(torch.equal(tensor, two.kept()[name]) for name, tensor in one.kept().items())


def test_what_is_remembered_is_what_was_kept_but_no_memory_of_it() -> None:
    x, method = smooth(8, 24, 9, 9), ASI(ranks=(3, 3, 3, 3))
    state = method.state_of(call_of(POINT, 8))
    first = kept_by(method, x, POINT, state)
    before = {name: basis.clone() for name, basis in first.bases.items()}
    assert all(torch.equal(state[f"asi_{name}"], basis) for name, basis in before.items())
    kept_by(method, smooth(8, 24, 9, 9).flip(0, 2), POINT, state)
    assert all(torch.equal(first.bases[name], basis) for name, basis in before.items())
    assert not torch.equal(state["asi_h"], before["h"])


def test_a_short_last_batch_and_a_longer_one_are_taken() -> None:
    method = ASI(ranks=(5, 4, 3, 3))
    results = []
    for _ in range(2):
        state = method.state_of(call_of(POINT, 8))
        results.append([kept_by(method, smooth(n, 24, 9, 9), POINT, state) for n in (8, 3, 8, 1, 11, 8)])
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(tensor, two.kept()[name]) for name, tensor in one.kept().items())
    assert [factors.core.shape[0] for factors in results[0]] == [5, 3, 5, 1, 5, 5]
    x, gy = smooth(3, 24, 9, 9), torch.randn(3, 8, 9, 9)
    found = method.grad_weight(results[0][1].kept(), gy, POINT)
    assert torch.allclose(found, weight_gradient(results[0][1].grown(*AXES), gy, POINT), atol=1e-3)
    exact = weight_gradient(x, gy, POINT)
    assert (found - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_bases_survive_a_batch_that_says_nothing(bad: float) -> None:
    x, method = smooth(8, 24, 9, 9), ASI(ranks=(3, 3, 3, 3))
    state = method.state_of(call_of(POINT, 8))
    for _ in range(6):
        kept_by(method, x, POINT, state)
    before = {role: basis @ basis.mT for role, basis in state.items()}
    kept_by(method, torch.full_like(x, bad), POINT, state)
    assert all(torch.allclose(basis @ basis.mT, before[role], atol=1e-4) for role, basis in state.items())


def test_a_channel_that_comes_alive_is_found() -> None:
    """Bases that were made when most channels were dead do not stay there."""
    method, alive = ASI(ranks=(8, 4, 9, 9)), smooth(8, 24, 9, 9)
    dead = alive.clone()
    dead[:, 1:] = 0
    state = method.state_of(call_of(POINT, 8))
    for _ in range(10):
        kept_by(method, dead, POINT, state)
    for _ in range(4):
        factors = kept_by(method, alive, POINT, state)
    assert (alive - factors.grown(*AXES)).norm() < 0.2 * alive.norm()


def test_predicted_bytes_are_those_measured() -> None:
    for net in ("Residual", "Inverted"):
        torch.manual_seed(0)
        model, x = scramble(NETS[net]()), torch.randn(4, 3, 16, 16)
        plan = last_layers(et.trace(model, x), 4, ASI(shares=(0.5, 0.3, 0.5, 0.5)))
        predicted = et.profile(model, x, plan)
        et.apply(model, plan)
        measured = et.measure(model, x, repeats=1)
        assert [row.kept_bytes for row in measured.layers] == [row.kept_bytes for row in predicted.layers]
        assert [row.backward_macs for row in measured.layers] == [row.backward_macs for row in predicted.layers]


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_copies_have_bases_of_their_own_and_undo_takes_them_away() -> None:
    torch.manual_seed(0)
    model, x = scramble(NETS["Residual"]()), torch.randn(4, 3, 16, 16)
    plan = last_layers(et.trace(model, x), 2, ASI(ranks=(2, 2, 4, 4)))
    keys, buffers = list(model.state_dict()), len(list(model.buffers()))
    undo = et.apply(model, plan)
    step(model, x)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    held = {name: b.clone() for name, b in model.named_buffers() if "asi_" in name}
    assert held and all(torch.equal(dict(twin.named_buffers())[name], b) for name, b in held.items())
    step(twin, x.flip(0))
    assert all(torch.equal(dict(model.named_buffers())[name], b) for name, b in held.items())
    first, second = step(model, x), step(copy.deepcopy(model), x)
    assert first.keys() == second.keys()
    undo()
    assert len(list(model.buffers())) == buffers


def test_two_forwards_before_backward_are_two_gradients() -> None:
    """What the first forward kept is not changed by the second."""
    torch.manual_seed(0)
    model, x = scramble(NETS["Residual"]()), torch.randn(4, 3, 16, 16)
    et.apply(model, last_layers(et.trace(model, x), 2, ASI(ranks=(2, 2, 4, 4))))
    twin = copy.deepcopy(model)
    model.zero_grad()
    first, second = model(x).square().sum(), model(x.flip(3)).square().sum()
    (first + second).backward()
    together = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    one, two = step(twin, x), step(twin, x.flip(3))
    assert all(torch.allclose(g, one[name] + two[name], rtol=1e-4, atol=1e-4) for name, g in together.items())
