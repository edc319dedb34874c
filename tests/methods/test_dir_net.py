"""DIR-Net and IR-Net: balanced weights, the surrogate and its schedule, how far the distribution lets it sharpen."""

from __future__ import annotations

import math

import pytest
import torch

from edgetune.methods.arithmetic.dir_net import (
    ALIVE,
    SAMPLE,
    DIRNet,
    quantile_of,
    shift_of,
    standardised,
    surrogate,
)


def at(progress: float) -> torch.Tensor:
    return torch.tensor(progress)


def test_filters_are_balanced_and_of_unit_deviation() -> None:
    weight = 3 + 5 * torch.randn(6, 4, 3, 3, dtype=torch.float64)
    even = standardised(weight)
    assert torch.allclose(even.mean((1, 2, 3)), torch.zeros(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(even.flatten(1).std(1), torch.ones(6, dtype=torch.float64))
    expected = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.flatten(1).std(1).view(-1, 1, 1, 1)
    assert torch.allclose(even, expected)


@pytest.mark.parametrize("shape", [(2, 3, 3, 3), (4, 1, 1, 1), (0, 3, 3, 3)], ids=str)
def test_equal_single_and_no_weights_stay_finite(shape: tuple[int, ...]) -> None:
    weight = torch.full(shape, 0.5)
    w = weight.clone().requires_grad_()
    made = DIRNet().quantize_weight(w, at(0.5))
    made.sum().backward()
    assert made.shape == weight.shape and made.isfinite().all()
    assert w.grad is not None and w.grad.isfinite().all()


def test_a_gaussian_filters_shift_is_one_and_a_peaked_ones_smaller() -> None:
    torch.manual_seed(0)
    assert torch.equal(shift_of(standardised(torch.randn(8, 64, 3, 3))), torch.ones(8, 1, 1, 1))
    peaked = torch.randn(8, 64, 3, 3) ** 5
    assert torch.all(shift_of(standardised(peaked)) <= 0.5)
    assert torch.equal(shift_of(torch.zeros(2, 3, 1, 1)), torch.ones(2, 1, 1, 1))


def test_gradient_goes_through_mean_and_deviation() -> None:
    torch.manual_seed(1)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    method, progress = DIRNet(), at(0.6)
    g = torch.randn_like(weight)
    (found,) = torch.autograd.grad(method.quantize_weight(weight, progress), weight, g)
    even = standardised(weight)
    slope = method.slope(even, progress)
    (expected,) = torch.autograd.grad(even, weight, g * shift_of(even.detach()) * slope)
    assert torch.allclose(found, expected)
    assert torch.allclose(found.sum((1, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_surrogate_is_the_derivative_of_its_integral() -> None:
    x = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    for sharpness in (0.01, 0.5, 1.0, 10.0):
        t = torch.tensor(sharpness, dtype=torch.float64)
        k = max(1 / sharpness, 1)
        (expected,) = torch.autograd.grad((k * torch.tanh(t * x)).sum(), x)
        assert torch.allclose(surrogate(x.detach(), t), expected)


def test_schedule_goes_from_identity_to_a_peak_by_equal_factors() -> None:
    x, method = torch.randn(64), DIRNet(alive=0.0)
    sharpness = [float(method.sharpness(x, at(p))) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert sharpness == pytest.approx([1e-3 * 10 ** (4 * p) for p in (0.0, 0.25, 0.5, 0.75, 1.0)], rel=1e-5)
    assert torch.allclose(method.slope(x, at(0.0)), torch.ones(64), atol=1e-4)
    assert float(method.slope(torch.zeros(1), at(1.0))) == pytest.approx(10.0)


def test_a_share_of_the_values_keeps_a_tenth_of_the_peak() -> None:
    torch.manual_seed(2)
    x = 3 * torch.randn(4096)
    for alive in (0.05, 0.1, 0.3):
        slopes = DIRNet(alive=alive, t_max=100.0).slope(x, at(1.0))
        living = float((slopes >= 0.1 * slopes.new_tensor(float(ALIVE / quantile_of(x, alive))) - 1e-6).float().mean())
        assert living == pytest.approx(alive, abs=2e-3)
    assert math.tanh(ALIVE) ** 2 == pytest.approx(0.9)


def test_quantiles_come_from_evenly_spaced_values_and_of_nothing_there_are_none() -> None:
    x = torch.arange(10 * SAMPLE, dtype=torch.float32)
    assert float(quantile_of(x, 0.5)) == pytest.approx(5 * SAMPLE, rel=1e-3)
    assert float(quantile_of(torch.zeros(0), 0.1)) == 0.0
    assert float(DIRNet().sharpness(torch.zeros(5), at(1.0))) == 10.0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_slopes_are_kept_to_within_half_a_step_of_their_range(bits: int) -> None:
    torch.manual_seed(3)
    x, g, method = torch.randn(2, 3, 8, 16), torch.ones(2, 3, 8, 16), DIRNet(slope_bits=bits)
    slopes = method.slope(x, at(0.9))
    found = method.times_slope(g, method.keep_slope(x, at(0.9)))
    span = float(slopes.max() - slopes.min())
    # the format itself holds a group's bounds in fewer digits
    assert float((found - slopes).abs().max()) <= span * (1 / (2 ** (bits + 1) - 2) + 0.01)


def test_ir_net_is_named_as_such() -> None:
    assert DIRNet(alive=0.0).label == "ir net" and DIRNet().label == "dir net"
