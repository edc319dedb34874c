"""LANCE: bases of the first batches, which stay; only the core is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgetune as et
from edgetune.hosts.conv import weight_gradient
from edgetune.hosts.tucker import AXES, Tucker, product, unfolded
from edgetune.methods.backward.lance import LANCE
from edgetune.overlap import ConvGeometry
from edgetune.plan import last_layers
from geometries import geometries, operands
from methods.test_asi import POINT, call_of, step
from methods.test_hosvd import smooth
from nets import NETS, scramble


def kept_by(method: LANCE, x: torch.Tensor, geometry: ConvGeometry, state: dict[str, torch.Tensor]) -> Tucker:
    kept = method.keep(x, geometry, state)
    assert isinstance(kept, dict)
    return Tucker.of(kept)


@settings(max_examples=40)
@given(geometries(), st.integers(1, 4))
def test_full_ranks_are_the_exact_gradient(geometry: ConvGeometry, batch: int) -> None:
    x, _, gy = operands(geometry, batch)
    method = LANCE(shares=(1, 1, 1))
    found = method.grad_weight(method.keep(x, geometry, method.state_of(call_of(geometry, batch))), gy, geometry)
    assert torch.allclose(found, weight_gradient(x, gy, geometry), atol=1e-9)


@settings(max_examples=60)
@given(geometries(), st.integers(1, 5), st.tuples(*[st.integers(1, 6)] * 3))
def test_the_gradient_is_that_of_x_projected_and_kept_has_the_size_it_says(
        geometry: ConvGeometry, batch: int, ranks: tuple[int, int, int]) -> None:
    x, _, gy = operands(geometry, batch)
    method = LANCE(ranks=ranks)
    state = method.state_of(call_of(geometry, batch))
    kept_by(method, torch.randn_like(x), geometry, state)
    factors = kept_by(method, x, geometry, state).to(x.dtype)
    projected = x
    for name, basis in factors.bases.items():
        projected = product(projected, basis @ basis.mT, AXES.index(name))
    assert torch.allclose(factors.grown(*AXES), projected, atol=1e-5 * float(x.abs().max()))
    found, expected = (each for each in (method.grad_weight(factors.kept(), gy, geometry),
                                         weight_gradient(projected, gy, geometry)))
    assert torch.allclose(found, expected, atol=1e-4 * max(1.0, float(expected.abs().max())))
    assert factors.core.shape == (batch, *(min(r, s) for r, s in zip(ranks, x.shape[1:], strict=True)))


def test_bases_are_those_of_the_decomposition_of_the_first_batch_and_stay() -> None:
    x, method = smooth(8, 24, 9, 9), LANCE(ranks=(3, 3, 3))
    state = method.state_of(call_of(POINT, 8))
    first = kept_by(method, x, POINT, state)
    leading = torch.linalg.svd(unfolded(x.double(), 1), full_matrices=False).U[:, :3].float()
    assert torch.allclose(first.bases["c"] @ first.bases["c"].mT, leading @ leading.mT, atol=1e-3)
    before = {role: tensor.clone() for role, tensor in state.items()}
    later = kept_by(method, smooth(8, 24, 9, 9).flip(1), POINT, state)
    assert all(torch.equal(tensor, before[role]) for role, tensor in state.items())
    assert all(later.bases[name] is state[f"lance_{name}"] for name in ("c", "h", "w"))


def test_bases_of_several_batches_hold_what_all_of_them_have() -> None:
    """Two batches in different subspaces: merged bases hold both, by their energy."""
    generator = torch.Generator().manual_seed(3)
    patterns = torch.linalg.qr(torch.randn(24, 4, generator=generator)).Q
    batches = [torch.einsum("nrhw,cr->nchw", torch.randn(8, 2, 9, 9, generator=generator), half)
               for half in patterns.split(2, 1)]
    method = LANCE(ranks=(4, 9, 9), batches=2)
    state = method.state_of(call_of(POINT, 8))
    during = kept_by(method, batches[0], POINT, state)
    assert during.bases["c"] is not state["lance_c"]
    kept_by(method, batches[1], POINT, state)
    assert int(state["lance_batches"]) == 2
    assert torch.allclose(state["lance_c"] @ state["lance_c"].mT, patterns @ patterns.mT, atol=1e-4)
    for x in batches:
        assert torch.allclose(kept_by(method, x, POINT, state).grown(*AXES), x, atol=1e-4)
    alone = LANCE(ranks=(4, 9, 9))
    state = alone.state_of(call_of(POINT, 8))
    kept_by(alone, batches[0], POINT, state)
    assert (kept_by(alone, batches[1], POINT, state).grown(*AXES) - batches[1]).norm() > 0.5 * batches[1].norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_batch_that_says_nothing_does_not_count(bad: float) -> None:
    x, method = smooth(8, 24, 9, 9), LANCE(ranks=(3, 3, 3))
    state = method.state_of(call_of(POINT, 8))
    kept_by(method, torch.full_like(x, bad), POINT, state)
    assert int(state["lance_batches"]) == 0
    factors = kept_by(method, x, POINT, state)
    assert int(state["lance_batches"]) == 1
    assert (x - factors.grown(*AXES)).norm() < 0.2 * x.norm()


def test_a_map_of_another_size_is_smaller_in_its_channels_alone() -> None:
    method = LANCE(ranks=(3, 3, 3))
    state = method.state_of(call_of(POINT, 8))
    kept_by(method, smooth(8, 24, 9, 9), POINT, state)
    assert kept_by(method, smooth(2, 24, 11, 9), POINT.at(11, 9), state).core.shape == (2, 3, 11, 3)


def test_without_a_state_the_bases_are_those_of_the_batch() -> None:
    x = smooth(8, 24, 9, 9)
    assert (x - kept_by(LANCE(ranks=(3, 3, 3)), x, POINT, {}).grown(*AXES)).norm() < 0.2 * x.norm()


@pytest.mark.parametrize("net", ["Residual", "Inverted"])
def test_predicted_bytes_are_those_measured_and_bases_are_no_part_of_them(net: str) -> None:
    torch.manual_seed(0)
    model, x = scramble(NETS[net]()), torch.randn(4, 3, 16, 16)
    method = LANCE(shares=(0.5, 0.5, 0.5))
    graph = et.trace(model, x)
    plan = last_layers(graph, 4, method)
    predicted = et.profile(model, x, plan)
    et.apply(model, plan)
    measured = et.measure(model, x, repeats=1)
    assert [row.kept_bytes for row in measured.layers] == [row.kept_bytes for row in predicted.layers]
    call = graph.layers("conv")[-1]
    n, c, h, w = call.in_shapes[0]
    core = n * max(1, round(c / 2)) * max(1, round(h / 2)) * max(1, round(w / 2))
    assert next(row.kept_bytes for row in measured.layers if row.name == call.name) == 4 * core


def test_copies_have_bases_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = scramble(NETS["Residual"]()), torch.randn(4, 3, 16, 16)
    keys = list(model.state_dict())
    undo = et.apply(model, last_layers(et.trace(model, x), 2, LANCE(ranks=(2, 4, 4))))
    twin = copy.deepcopy(model)
    step(model, x)
    counts = [int(b) for each in (model, twin) for name, b in each.named_buffers() if name.endswith("lance_batches")]
    assert counts == [1, 1, 0, 0]
    assert list(model.state_dict()) == keys
    undo()
    assert not any("lance" in name for name, _ in model.named_buffers())
