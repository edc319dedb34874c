"""SAME padding against its definition, written out slowly."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn

from edgetune.models import Conv2dSame
from edgetune.models.layers import make_divisible
from edgetune.overlap import same_pads


@given(
    h=st.integers(1, 17),
    w=st.integers(1, 17),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    dilation=st.integers(1, 3),
)
def test_pads_and_output_follow_tensorflow(h: int, w: int, kernel: int, stride: int, dilation: int) -> None:
    layer = Conv2dSame(2, 3, kernel, stride, dilation=dilation).double()
    x = torch.randn(1, 2, h, w, dtype=torch.float64)
    top, bottom, left, right = layer.pads(h, w)
    y = layer(x)
    assert y.shape == (1, 3, -(-h // stride), -(-w // stride))
    # no more zeros than needed, the odd one last, the same rule as where geometry is described
    assert 0 <= bottom - top <= 1
    assert 0 <= right - left <= 1
    assert (top, bottom, left, right) == same_pads(
        (h, w), (kernel, kernel), (stride, stride), (dilation, dilation)
    )
    padded = F.pad(x, (left, right, top, bottom))
    for o, p, q in ((0, 0, 0), (2, y.shape[2] - 1, y.shape[3] - 1)):
        patch = padded[0, :, p * stride :, q * stride :][:, ::dilation, ::dilation][:, :kernel, :kernel]
        assert layer.bias is not None
        assert torch.allclose((patch * layer.weight[o]).sum() + layer.bias[o], y[0, o, p, q])


def test_it_traces_for_any_size() -> None:
    net = nn.Sequential(Conv2dSame(3, 4, 3, 2), nn.ReLU())
    traced = fx.symbolic_trace(net)
    for size in (7, 8):
        x = torch.randn(1, 3, size, size)
        assert torch.equal(traced(x), net(x))


def test_it_exports() -> None:
    net, x = nn.Sequential(Conv2dSame(3, 4, 3, 2)), torch.randn(1, 3, 8, 8)
    assert torch.allclose(torch.export.export(net, (x,)).module()(x), net(x))


@pytest.mark.parametrize(("asked", "given_"), [(32, 32), (11.2, 16), (8.4, 8), (3, 8), (33.6, 32)])
def test_channels_are_rounded_to_eights(asked: float, given_: int) -> None:
    assert make_divisible(asked) == given_
