"""What the adder convolutions return, without the numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgetune.errors import EdgetuneError
from edgetune.kernels.geometry import ceil_div, dense, is_channels_last, memory_format
from edgetune.kernels.windows import windows, windows_of
from edgetune.shapes import expect

QUAD, OCTET = 4, 8
"""Filters, and channels of each, that lie side by side where bytes are compared."""

_LARGEST = 2**31 - 1


def adder_conv(x: Tensor, weight: Tensor, stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int],
               groups: int) -> Tensor:
    _check_float(x)
    p, q = windows_of(x, weight, stride, pads, dilation, groups).out_size(*x.shape[2:])
    return torch.empty((x.shape[0], weight.shape[0], p, q), dtype=x.dtype, device=x.device,
                       memory_format=memory_format(is_channels_last(dense(x))))


def adder_conv_input_gradient(gy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], pads: Sequence[int],
                              dilation: Sequence[int], groups: int) -> Tensor:
    _check_float(x)
    p, q = windows_of(x, weight, stride, pads, dilation, groups).out_size(*x.shape[2:])
    expect(gy, "n o p q", n=x.shape[0], o=weight.shape[0], p=p, q=q)
    if gy.dtype != x.dtype:
        raise EdgetuneError(f"the gradient is {gy.dtype} and x {x.dtype}: give both in one type")
    return torch.empty(x.shape, dtype=x.dtype, device=x.device,
                       memory_format=memory_format(is_channels_last(dense(x))))


def adder_filters(weight: Tensor, groups: int) -> Tensor:
    o, i, u, v = expect(weight, "o i u v")
    _check_bytes(weight)
    if groups < 1 or o % groups:
        raise EdgetuneError(f"{o} filters don't divide into {groups} groups: give the layer's own groups")
    return torch.empty((laid_out(o, i, u * v, groups),), dtype=torch.uint8, device=weight.device)


def adder_conv_u8(x: Tensor, filters: Tensor, out_channels: int, kernel: Sequence[int], stride: Sequence[int],
                  pads: Sequence[int], dilation: Sequence[int], groups: int, pad_value: int) -> Tensor:
    n, c, h, w = expect(x, "n c h w")
    _check_bytes(x)
    p, q = windows(kernel, stride, pads, dilation, groups).out_size(h, w)
    taps = kernel[0] * kernel[1]
    if c % groups or out_channels % groups or filters.shape != (laid_out(out_channels, c // groups, taps, groups),):
        raise EdgetuneError(f"filters of shape {tuple(filters.shape)} aren't {out_channels} filters of {c} channels in "
                            f"{groups} groups with a {kernel[0]}x{kernel[1]} kernel: give what adder_filters made")
    _check_bytes(filters)
    if not 0 <= pad_value <= 255:
        raise EdgetuneError(f"padding of {pad_value} isn't a byte: give 0 to 255")
    _check_sums(c // groups * taps)
    return torch.empty((n, out_channels, p, q), dtype=torch.int32, device=x.device,
                       memory_format=torch.channels_last)


def adder_conv_steps(x: Tensor, filters: Tensor, members: Tensor, step: Tensor, shift: Tensor, sizes: Sequence[int],
                     top: int, exact: bool, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int],
                     dilation: Sequence[int]) -> Tensor:
    n, c, h, w = expect(x, "n c h w")
    p, q = windows(kernel, stride, pads, dilation, 1).out_size(h, w)
    o, taps = sum(sizes), kernel[0] * kernel[1]
    if not 1 <= top <= 255:
        raise EdgetuneError(f"{top} isn't the last step that a byte holds: give 1 to 255")
    if min(sizes, default=0) < 1 or filters.shape != (sum(laid_out(size, c, taps, 1) for size in sizes),):
        raise EdgetuneError(f"filters of shape {tuple(filters.shape)} aren't groups of {list(sizes)} filters of {c} "
                            f"channels with a {kernel[0]}x{kernel[1]} kernel: give what adder_filters made of each")
    expect(members, "o", o=o)
    expect(step, "g", g=len(sizes))
    expect(shift, "o", o=o)
    _check_bytes(filters)
    for tensor, dtype in ((x, torch.float32), (members, torch.int32), (step, torch.float32), (shift, torch.float32)):
        if tensor.dtype != dtype:
            raise EdgetuneError(f"a tensor of type {tensor.dtype} stands where {dtype} is meant: give that")
    _check_sums(c * taps)
    return torch.empty((n, o, p, q), dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


def laid_out(o: int, i: int, taps: int, groups: int) -> int:
    """Bytes of what adder_filters makes of o filters of i channels each."""
    return groups * ceil_div(o // groups, QUAD) * taps * ceil_div(i, OCTET) * QUAD * OCTET


def _check_float(x: Tensor) -> None:
    if not x.is_floating_point():
        raise EdgetuneError(f"x is {x.dtype}: give numbers with a point, or bytes to adder_conv_u8")


def _check_bytes(x: Tensor) -> None:
    if x.dtype != torch.uint8:
        raise EdgetuneError(f"a tensor of type {x.dtype} isn't bytes: give uint8")


def _check_sums(differences: int) -> None:
    if differences * 255 > _LARGEST:
        raise EdgetuneError(f"sums over {differences} differences of bytes may not fit into int32: split the channels")
