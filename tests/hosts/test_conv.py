"""The exact products of a convolution, in either memory order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgetune.hosts.conv import both_gradients, convolve, input_gradient, weight_gradient
from edgetune.overlap import ConvGeometry


@pytest.mark.parametrize("channels", [1, 3, 5, 6, 7, 8, 9])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_pointwise_weight_gradients(channels: int, stride: int, order: torch.memory_format) -> None:
    """Few channels at stride 2, channels last: libraries have been seen to get these wrong."""
    geometry = ConvGeometry(in_channels=channels, out_channels=8, groups=1, in_hw=(16, 16), kernel=(1, 1),
                            stride=(stride, stride), dilation=(1, 1), pads=(0, 0, 0, 0), same=False)  # fmt: skip
    x = torch.randn(2, channels, 16, 16).contiguous(memory_format=order)
    weight = torch.zeros(8, channels, 1, 1, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x.double(), weight, stride=stride)
    g = torch.randn(y.shape).contiguous(memory_format=order)
    y.backward(g.double())
    _, gw = both_gradients(x, g, torch.zeros_like(weight).float(), geometry)
    for found in (weight_gradient(x, g, geometry), gw):
        torch.testing.assert_close(found.double(), weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 12])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_order", [torch.contiguous_format, torch.channels_last])
def test_input_gradients_alone(groups: int, kernel: int, order: torch.memory_format,
                               weight_order: torch.memory_format) -> None:
    """In every memory order, with more numbers coming in than going out and fewer, and g not dense: none is changed."""
    for out_channels, pads in ((12, (1, 1, 1, 1)), (36, (0, 0, 0, 0)), (12, (1, 0, 2, 1))):
        geometry = ConvGeometry(in_channels=12, out_channels=out_channels, groups=groups, in_hw=(9, 8), stride=(2, 1),
                                kernel=(kernel, kernel), dilation=(1, 1), pads=pads)  # fmt: skip
        x = torch.randn(2, 12, 9, 8, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(out_channels, 12 // groups, kernel, kernel, dtype=torch.float64)
        weight = weight.contiguous(memory_format=weight_order)
        y = convolve(x, weight, None, geometry)
        g = torch.randn_like(y).contiguous(memory_format=order)
        for given in (g, torch.cat((g, g), 3)[..., :g.shape[3]]):
            before = given.clone()
            (expected,) = torch.autograd.grad(y, x, given, retain_graph=True)
            torch.testing.assert_close(input_gradient(given, weight, geometry), expected)
            assert torch.equal(given, before)
