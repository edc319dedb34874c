"""The adder layer's function against its formulas, written out in float64, and what it keeps and computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.errors import EdgetuneError
from edgetune.hosts import adder
from edgetune.overlap import ConvGeometry
from geometries import geometries, operands
from kernels.slow_adder import columns, filters_of

SMALL = ConvGeometry(in_channels=6, out_channels=4, groups=2, in_hw=(7, 6), kernel=(3, 2), stride=(2, 1),
                     dilation=(1, 2), pads=(1, 0, 2, 1))


def _slow(x: torch.Tensor, w: torch.Tensor, gy: torch.Tensor,
          geometry: ConvGeometry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, gx and gw, each by one tensor that holds every difference."""
    top, bottom, left, right = geometry.pads
    groups, n, o = geometry.groups, x.shape[0], w.shape[0]
    leaf = x.clone().requires_grad_()
    unfolded = columns(leaf, list(geometry.kernel), list(geometry.stride), [top, left, bottom, right],
                       list(geometry.dilation), groups)
    apart, g = unfolded.detach() - filters_of(w, groups), gy.reshape(n, groups, o // groups, 1, -1)
    y = -apart.abs().sum(3).reshape(gy.shape)
    gx = torch.autograd.grad(unfolded, leaf, ((-apart).clamp(-1, 1) * g).sum(2, keepdim=True))[0]
    return y, gx, (apart * g).sum((0, 4)).reshape(w.shape)


@settings(max_examples=40, deadline=None)
@given(geometries(max_size=6), st.integers(1, 2), st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_values_and_gradients_are_the_formulas(geometry: ConvGeometry, batch: int, dtype: torch.dtype,
                                               last: bool) -> None:
    x, w, gy = operands(geometry, batch)
    order = torch.channels_last if last else torch.contiguous_format
    x32 = x.to(dtype).contiguous(memory_format=order).requires_grad_()
    w32 = w.to(dtype).requires_grad_()
    y = adder.adder(x32, w32, geometry, eta=None)
    y.backward(gy.to(dtype))
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    for found, wanted in zip((y, x32.grad, w32.grad), _slow(x, w, gy, geometry), strict=True):
        assert found is not None
        torch.testing.assert_close(found.double(), wanted, **close)


def test_scaled_gradients_have_the_published_norm() -> None:
    x, w, gy = operands(SMALL)
    w.requires_grad_()
    adder.adder(x, w, SMALL).backward(gy)
    plain = _slow(x, w.detach(), gy, SMALL)[2]
    assert w.grad is not None
    torch.testing.assert_close(w.grad, 0.2 * plain.numel() ** 0.5 * plain / plain.norm())
    assert not adder.scaled(torch.zeros(3, 3), 0.2).any()


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_nothing_is_computed_that_no_one_asked_for(needs: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("input_gradient", "weight_gradient"):
        real = getattr(adder, name)
        monkeypatch.setattr(adder, name, lambda *a, real=real, name=name: asked.append(name) or real(*a))
    x, w, gy = operands(SMALL)
    x.requires_grad_(needs[0]), w.requires_grad_(needs[1])
    y = adder.adder(x, w, SMALL)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(gy)
    assert asked == ["input_gradient"] * needs[0] + ["weight_gradient"] * needs[1]


def test_x_and_the_weight_are_what_is_kept() -> None:
    kept: list[torch.Tensor] = []
    x, w, _ = operands(SMALL)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adder.adder(x, w.requires_grad_(), SMALL)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), w.data_ptr()}


def test_an_empty_batch_teaches_nothing() -> None:
    x, w, _ = (t.float() for t in operands(SMALL, batch=0))
    adder.adder(x.requires_grad_(), w.requires_grad_(), SMALL).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert w.grad is not None and not w.grad.any()


def test_meta_and_refusals() -> None:
    x, w, _ = (t.float() for t in operands(SMALL))
    y = adder.adder(x.to("meta"), w.to("meta"), SMALL)
    assert y.shape == (2, 4, *SMALL.out_hw) and y.device.type == "meta"
    with pytest.raises(EdgetuneError, match="give the layer's own weight and groups"):
        adder.adder(x[:, :4], w, SMALL)
    y = adder.adder(x, w.requires_grad_(), SMALL)
    with pytest.raises(EdgetuneError, match="create_graph"):
        torch.autograd.grad(y.sum(), w, create_graph=True)
