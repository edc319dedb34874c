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
_adder_conv_u8_scaled = _ops.adder_conv_u8_scaled.default


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


def adder_conv_u8_scaled(x: Tensor, filters: Tensor, scale: Tensor, shift: Tensor, more: Tensor | None,
                         kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int],
                         groups: int = 1, pad_value: int = 0) -> Tensor:
    """scale[o] (s + more) + shift[o] of the sums s that adder_conv_u8 gives: float32 (n o p q), channels last.

    scale and shift (o) are those of a layer with its norm folded in; more (n p q) is what clamping x took from all
    filters' sums alike, in steps of x. All float32.
    """
    return _adder_conv_u8_scaled(x, filters, scale, shift, more, kernel, stride, pads, dilation, groups, pad_value)
