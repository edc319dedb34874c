"""The adder convolutions as functions (AdderNet, CVPR 2020). None changes its arguments; none has a gradient formula.

Shapes: x (n c h w), weight (o i u v) with i = c / groups, y and gy (n o p q), in any layout, fastest channels last.
Sizes in pixels: stride and dilation (rows, columns), pads (top, left, bottom, right). Wrong arguments raise
EdgetuneError.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgetune.kernels import schema as _schema  # noqa: F401  defines torch.ops.edgetune

_ops = torch.ops.edgetune
_adder_conv = _ops.adder_conv.default
_adder_conv_input_gradient = _ops.adder_conv_input_gradient.default
_adder_filters = _ops.adder_filters.default
_adder_conv_u8 = _ops.adder_conv_u8.default
_adder_conv_steps = _ops.adder_conv_steps.default


def adder_conv(x: Tensor, weight: Tensor, stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int],
               groups: int = 1) -> Tensor:
    """y = - sum over taps and channels of |x - w|, in the memory order of x. Padding is x = 0 and counts |w|."""
    return _adder_conv(x, weight, stride, pads, dilation, groups)


def adder_conv_input_gradient(gy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], pads: Sequence[int],
                              dilation: Sequence[int], groups: int = 1) -> Tensor:
    """gx, where a pixel gets clip(w - x, -1, 1) gy from every filter and tap that reads it; in the memory order of x.

    The slope is AdderNet's: the true one is sign(w - x).
    """
    return _adder_conv_input_gradient(gy, x, weight, stride, pads, dilation, groups)


def adder_filters(weight: Tensor, groups: int = 1) -> Tensor:
    """A weight (o i u v) of bytes, laid out for adder_conv_u8: uint8 (bytes,).

    The order is (group, quad of filters, tap, octet of channels, 4 filters, 8 channels), filled up with 0.
    """
    return _adder_filters(weight, groups)


def adder_conv_u8(x: Tensor, filters: Tensor, out_channels: int, kernel: Sequence[int], stride: Sequence[int],
                  pads: Sequence[int], dilation: Sequence[int], groups: int = 1, pad_value: int = 0) -> Tensor:
    """The sum of |x - w| over taps and channels, of bytes and exact: int32 (n o p q), channels last.

    `filters` is what adder_filters made of the weight. Padding is x = `pad_value`.
    """
    return _adder_conv_u8(x, filters, out_channels, kernel, stride, pads, dilation, groups, pad_value)


def adder_conv_steps(x: Tensor, filters: Tensor, members: Tensor, step: Tensor, shift: Tensor, sizes: Sequence[int],
                     top: int, exact: bool, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int],
                     dilation: Sequence[int]) -> Tensor:
    """A quantized adder layer: y = -step (sum |a - w| + over) + shift, float32 (n o p q), channels last.

    x is float32. Filters are in groups, `sizes` of each, with one step a group (g): a = round(x (1 / step)), half to
    even, between 0 and `top` (1 to 255), and w whole steps in bytes. With `exact` over is the sum of
    max(x (1 / step) - top, 0), else 0. `filters` is what adder_filters made of each group, one after the other;
    `members` int32 (o) the channel of each filter in that order, `shift` (o) in that order too. Padding is x = 0.
    """
    return _adder_conv_steps(x, filters, members, step, shift, sizes, top, exact, kernel, stride, pads, dilation)
