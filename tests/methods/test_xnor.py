"""XNOR-Net: scale and signs, the exact gradient of both, the input's scale, order of blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from edgetune.graph import trace
from edgetune.methods.arithmetic.xnor import XNOR, scaled_signs, window_means
from edgetune.overlap import ConvGeometry

ONE = torch.ones(())


def geometry(**changes: object) -> ConvGeometry:
    facts = {"in_channels": 3, "out_channels": 4, "groups": 1, "in_hw": (7, 6), "kernel": (3, 3), "stride": (1, 1),
             "dilation": (1, 1), "pads": (1, 1, 1, 1)}  # fmt: skip
    return ConvGeometry.model_validate({**facts, **changes})


def test_scale_and_signs_come_closest_to_the_filter() -> None:
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    made = scaled_signs(weight)
    error = (weight - made).square().sum((1, 2, 3))
    for factor in (0.9, 1.1):
        assert torch.all(error < (weight - factor * made).square().sum((1, 2, 3)))
    flipped = made.clone()
    flipped[:, 0, 0, 0] *= -1
    assert torch.all(error < (weight - flipped).square().sum((1, 2, 3)))


def test_weight_gradient_is_the_whole_chain_rule() -> None:
    weight = torch.randn(4, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(weight)
    (found,) = torch.autograd.grad(scaled_signs(weight), weight, g)
    with torch.no_grad():
        signs, alpha = weight.sign(), weight.abs().mean((1, 2, 3), keepdim=True)
        through_alpha = signs / weight[0].numel() * (g * signs).sum((1, 2, 3), keepdim=True)
        expected = through_alpha + alpha * g * (weight.abs() < 1)
    assert torch.allclose(found, expected)


def test_gradient_of_the_scale_is_that_of_finite_differences() -> None:
    weight = torch.randn(1, 2, 3, 3, dtype=torch.float64)

    def alpha(w: torch.Tensor) -> torch.Tensor:
        return scaled_signs(w).abs().sum()

    w = weight.clone().requires_grad_()
    (found,) = torch.autograd.grad(alpha(w), w)
    step = 1e-6
    for index in range(weight.numel()):
        moved = weight.clone().view(-1)
        moved[index] += step
        slope = (alpha(moved.view_as(weight)) - alpha(weight)) / step
        # the signs themselves do not move under so small a step, so alpha's part is all there is
        own = (weight.abs().mean() * (weight.abs() < 1)).view(-1)[index] * weight.sign().view(-1)[index]
        assert found.view(-1)[index] - own == pytest.approx(float(slope), abs=1e-5)


def test_means_under_windows_are_those_of_the_unfolded_map() -> None:
    x, layer = torch.randn(2, 3, 7, 6, dtype=torch.float64), geometry(stride=(2, 1))
    columns = F.unfold(x.abs(), 3, padding=1, stride=(2, 1))
    expected = columns.sum(1) / (3 * 9)
    assert torch.allclose(window_means(x, layer).flatten(1), expected)


def test_input_scale_multiplies_the_answer() -> None:
    x, weight, layer = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3), geometry()
    plain = XNOR().convolve(x, weight, layer, ONE)
    scaled = XNOR(input_scale=True).convolve(x, weight, layer, ONE)
    assert torch.allclose(scaled, plain * window_means(x, layer))


def test_a_binary_weight_network_reads_its_input_as_it_is() -> None:
    x, weight, layer = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3), geometry()
    found = XNOR(activations=False).convolve(x, weight, layer, ONE)
    assert torch.allclose(found, F.conv2d(x, scaled_signs(weight), padding=1), atol=1e-5)
    assert XNOR(activations=False).activation_bits == 32 and XNOR().activation_bits == 1 == XNOR().weight_bits
    assert XNOR(activations=False).label == "xnor, binary weights"


@pytest.mark.parametrize("pad_value", [-1, 0, 1])
def test_borders_count_as_pad_value(pad_value: int) -> None:
    x, weight, layer = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3), geometry()
    signs = F.pad(torch.where(x >= 0, 1.0, -1.0), (1, 1, 1, 1), value=pad_value)
    expected = F.conv2d(signs, scaled_signs(weight))
    with torch.no_grad():
        assert torch.allclose(XNOR(pad_value=pad_value).convolve(x, weight, layer, ONE), expected, atol=1e-5)


def test_weights_are_float_until_their_time_has_come() -> None:
    x, weight, layer = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3), geometry()
    method = XNOR(weights_from=0.5)
    signs = F.pad(torch.where(x >= 0, 1.0, -1.0), (1, 1, 1, 1), value=1)
    assert torch.allclose(method.convolve(x, weight, layer, torch.tensor(0.49)), F.conv2d(signs, weight), atol=1e-5)
    late = method.convolve(x, weight, layer, torch.tensor(0.5))
    assert torch.allclose(late, F.conv2d(signs, scaled_signs(weight)), atol=1e-5)


def test_spares_shortcuts_and_groups() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1, 2), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3))
    reasons = [XNOR().spares(call) for call in trace(model, torch.randn(1, 4, 12, 12)).layers("conv")]
    assert "shortcut" in str(reasons[0]) and "groups" in str(reasons[1]) and reasons[2] is None


@pytest.mark.parametrize("wrong", [{"pad_value": 2}, {"weights_from": 1.0}, {"weights_from": -0.1}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        XNOR(**wrong)
