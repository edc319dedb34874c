"""Gradient filtering against slow, obvious references in float64 on random geometries."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.hosts.conv import convolve
from edgetune.hosts.walsh import analyse, synthesise
from edgetune.methods.backward.gradient_filter import GradientFilter, input_cell
from edgetune.overlap import ConvGeometry
from geometries import geometries, operands


def gradients(method: GradientFilter, x: torch.Tensor, w: torch.Tensor, gy: torch.Tensor,
              geometry: ConvGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    g = method.receive(gy, geometry)
    return method.grad_input(g, w, geometry), method.grad_weight(method.save(x, geometry), g, geometry)


def autograd(x: torch.Tensor, w: torch.Tensor, gy: torch.Tensor,
             geometry: ConvGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    return torch.autograd.grad(convolve(x, w, None, geometry), (x, w), gy)


def patch_constant(x: torch.Tensor, cell: tuple[int, int]) -> torch.Tensor:
    """Every pixel takes the mean of its cell, pixel by pixel."""
    out = torch.empty_like(x)
    for top in range(0, x.shape[2], cell[0]):
        for left in range(0, x.shape[3], cell[1]):
            part = x[:, :, top:top + cell[0], left:left + cell[1]]
            out[:, :, top:top + cell[0], left:left + cell[1]] = part.mean((2, 3), keepdim=True)
    return out


@settings(max_examples=80)
@given(geometries(), st.integers(0, 3))
def test_grid_form_on_single_pixels_is_autograd(geometry: ConvGeometry, batch: int) -> None:
    x, w, gy = operands(geometry, batch)
    gx, gw = gradients(GradientFilter(patch_px=1, taps="grid"), x, w, gy, geometry)
    expected_gx, expected_gw = autograd(x, w, gy, geometry)
    assert torch.allclose(gx, expected_gx, atol=1e-10) and torch.allclose(gw, expected_gw, atol=1e-10)


@settings(max_examples=80)
@given(geometries(), st.integers(2, 5))
def test_grid_form_is_exact_for_patch_constant_maps(geometry: ConvGeometry, patch_px: int) -> None:
    """Galerkin: gx is the cell mean of the exact adjoint, gw exact for a cell-constant x, when gy is cell-constant."""
    x, w, gy = operands(geometry)
    cell_in = input_cell(geometry, patch_px, "grid")
    gx, gw = gradients(GradientFilter(patch_px=patch_px, taps="grid"), x, w, gy, geometry)
    expected_gx, expected_gw = autograd(patch_constant(x, cell_in), w, patch_constant(gy, (patch_px,) * 2), geometry)
    assert torch.allclose(gx, patch_constant(expected_gx, cell_in), atol=1e-10)
    assert torch.allclose(gw, expected_gw, atol=1e-10)


@settings(max_examples=80)
@given(geometries(), st.integers(1, 5))
def test_mean_form_gives_every_tap_the_mean_of_a_flat_picture(geometry: ConvGeometry, patch_px: int) -> None:
    """On constant maps no averaging loses anything: the mean form then has the exact mean over taps."""
    x, w, gy = operands(geometry)
    x, gy = torch.ones_like(x) * x[:, :, :1, :1], torch.ones_like(gy) * gy[:, :, :1, :1]
    w = w[:, :, :1, :1].expand_as(w)
    gx, gw = gradients(GradientFilter(patch_px=patch_px), x, w, gy, geometry)
    expected_gx, expected_gw = autograd(x, w, gy, geometry)
    assert torch.allclose(gw, expected_gw.mean((2, 3), keepdim=True).expand_as(gw), atol=1e-9)
    cell_in = input_cell(geometry, patch_px, "mean")
    assert torch.allclose(gx, patch_constant(expected_gx, cell_in), atol=1e-9)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_strided_layers_have_the_right_scale(stride: int) -> None:
    """The published operator is stride**2 too large; the ratio of sums must be one at every stride."""
    geometry = ConvGeometry(in_channels=4, out_channels=4, groups=1, in_hw=(32, 32), kernel=(3, 3),
                            stride=(stride, stride), dilation=(1, 1), pads=(1, 1, 1, 1))
    x, w, gy = operands(geometry, batch=4)
    x, w, gy = x.abs(), w.abs(), gy.abs()
    gx, gw = gradients(GradientFilter(patch_px=2), x, w, gy, geometry)
    expected_gx, expected_gw = autograd(x, w, gy, geometry)
    assert gx.sum() / expected_gx.sum() == pytest.approx(1, abs=0.02)
    assert gw.sum() / expected_gw.sum() == pytest.approx(1, abs=0.02)


@settings(max_examples=40)
@given(geometries(), st.sampled_from([2, 4]))
def test_four_bases_are_half_the_patch(geometry: ConvGeometry, patch_px: int) -> None:
    """Two Walsh functions an axis span exactly the patches of half the size, on maps of whole patches."""
    size = tuple(8 * s for s in geometry.stride)
    geometry = geometry.model_copy(update={"in_hw": size, "kernel": (1, 1), "pads": (0, 0, 0, 0)})
    x, w, gy = operands(geometry)
    bases = gradients(GradientFilter(patch_px=patch_px, bases=4), x, w, gy, geometry)
    halves = gradients(GradientFilter(patch_px=patch_px // 2), x, w, gy, geometry)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(bases, halves, strict=True))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.integers(1, 6))
def test_walsh_synthesis_of_analysis_is_a_projection(h: int, w: int, cell: int, bases: int) -> None:
    x = torch.randn(2, 3, h, w, dtype=torch.float64)
    once = synthesise(analyse(x, (cell, cell), bases), (h, w), (cell, cell))
    twice = synthesise(analyse(once, (cell, cell), bases), (h, w), (cell, cell))
    assert torch.allclose(once, twice, atol=1e-10)
    mean = patch_constant(x, (cell, cell))
    assert (x - once).square().sum() <= (x - mean).square().sum() + 1e-9
    assert torch.allclose(patch_constant(once, (cell, cell)), mean, atol=1e-10)


def test_more_bases_come_closer_to_the_exact_gradient() -> None:
    geometry = ConvGeometry(in_channels=3, out_channels=4, groups=1, in_hw=(16, 16), kernel=(1, 1), stride=(1, 1),
                            dilation=(1, 1), pads=(0, 0, 0, 0))
    x, w, gy = operands(geometry)
    smooth = torch.ones(3, 1, 5, 5, dtype=torch.float64) / 25
    x = F.conv2d(x, smooth, padding=2, groups=3)
    _, exact = autograd(x, w, gy, geometry)
    errors = [(gradients(GradientFilter(patch_px=4, bases=b), x, w, gy, geometry)[1] - exact).norm().item()
              for b in (1, 3, 6, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-9


def test_bases_with_the_grid_form_are_refused() -> None:
    from edgetune.graph import Call
    call = Call(name="c", node="c", kind="conv", function="conv2d")
    assert "smaller patch_px" in (GradientFilter(bases=2, taps="grid").refuse(call) or "")
    assert "not a convolution" in (GradientFilter().refuse(call.model_copy(update={"kind": "linear"})) or "")
