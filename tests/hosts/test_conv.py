"""The exact products of a convolution, in either memory order."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from edgetune.hosts.conv import both_gradients, weight_gradient
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
