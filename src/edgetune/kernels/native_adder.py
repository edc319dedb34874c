"""The native adder convolutions: each fills the output it is given and returns True, or returns False to decline.

Declined are types other than float32, and maps without elements. Tensors in another order are brought channels last
first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, get_num_threads

from edgetune.kernels.calls import N, function
from edgetune.kernels.geometry import ceil_div, dense, is_channels_last
from edgetune.kernels.windows import Windows, windows

_LANES = 8


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Job(NamedTuple):
    """What C is told of a layer: the numbers, their address, and how many elements the framed map has.

    A map is framed where it has padding, or groups that are filled up; else it serves as it is, and that is 0.
    """

    numbers: ctypes.Array[ctypes.c_int64]
    address: int
    framed: int


@lru_cache(maxsize=1024)
def _job(shape: tuple[int, ...], out_channels: int, found: Windows, room: int, *more: int) -> _Job:
    """Of x's shape, and `room` channels for a group in the framed map."""
    (n, c, h, w), (top, left, bottom, right) = shape, found.pads
    sizes = (*shape, out_channels, *found.kernel, *found.out_size(h, w), *found.stride, *found.pads, *found.dilation,
             found.groups, *more)
    numbers = (N * len(sizes))(*sizes)
    needless = c == room * found.groups and not any(found.pads)
    framed = 0 if needless else n * (top + h + bottom) * (left + w + right) * room * found.groups
    return _Job(numbers, ctypes.addressof(numbers), framed)


def _steps(weight: Tensor) -> tuple[int, int, int]:
    """Elements from one filter, channel and tap of a dense weight (o i u v) to the next."""
    _, i, u, v = weight.shape
    return (i * u * v, 1, i) if is_channels_last(weight) else (i * u * v, u * v, 1)


def _lanes(count: int) -> int:
    return ceil_div(count, _LANES) * _LANES


def _empty(x: Tensor, weight: Tensor) -> bool:
    return x.numel() == 0 or weight.numel() == 0


def adder_conv(out: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], pads: Sequence[int],
               dilation: Sequence[int], groups: int) -> bool:
    run = function("adder_conv", x.dtype)
    if run is None or _empty(x, weight):
        return False
    weight, (o, i, u, v) = dense(weight), weight.shape
    found = windows((u, v), stride, pads, dilation, groups)
    apart = groups > 1 and groups == o == x.shape[1]
    filters = _lanes(o) if apart else groups * _lanes(o // groups)
    job = _job(tuple(x.shape), o, found, i, *_steps(weight), is_channels_last(out))
    scratch, x = x.new_empty(filters * i * u * v + job.framed), _last(x)
    run(x.data_ptr(), weight.data_ptr(), out.data_ptr(), scratch.data_ptr(), job.address, get_num_threads())
    return True


def adder_conv_input_gradient(out: Tensor, gy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int],
                              pads: Sequence[int], dilation: Sequence[int], groups: int) -> bool:
    run = function("adder_conv_input_gradient", x.dtype)
    if run is None or _empty(x, weight):
        return False
    weight, (o, i, u, v) = dense(weight), weight.shape
    found = windows((u, v), stride, pads, dilation, groups)
    apart = groups > 1 and groups == o == x.shape[1]
    lanes = _lanes(o) if apart else o * _lanes(i)
    job, scratch = _job(tuple(x.shape), o, found, i, *_steps(weight)), x.new_empty(lanes * u * v)
    gy, x = _last(gy), _last(x)
    gx = torch.empty_like(x) if not out.is_contiguous(memory_format=torch.channels_last) else out
    run(gy.data_ptr(), x.data_ptr(), weight.data_ptr(), gx.data_ptr(), scratch.data_ptr(), job.address,
        get_num_threads())
    if gx is not out:
        out.copy_(gx)
    return True


def adder_filters(out: Tensor, weight: Tensor, groups: int) -> bool:
    """Done once a layer, so that plain torch is fast enough."""
    return False


def adder_conv_u8(out: Tensor, x: Tensor, filters: Tensor, out_channels: int, kernel: Sequence[int],
                  stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int], groups: int,
                  pad_value: int) -> bool:
    run = function("adder_conv_u8", torch.float32)
    if run is None or _empty(x, filters):
        return False
    found = windows(kernel, stride, pads, dilation, groups)
    job = _job(tuple(x.shape), out_channels, found, _lanes(x.shape[1] // groups), pad_value)
    scratch, x, filters = x.new_empty(job.framed), _last(x), filters.contiguous()
    run(x.data_ptr(), filters.data_ptr(), out.data_ptr(), scratch.data_ptr(), job.address, get_num_threads())
    return True


def adder_conv_steps(out: Tensor, x: Tensor, filters: Tensor, members: Tensor, step: Tensor, shift: Tensor,
                     sizes: Sequence[int], top: int, exact: bool, kernel: Sequence[int], stride: Sequence[int],
                     pads: Sequence[int], dilation: Sequence[int]) -> bool:
    run = function("adder_conv_steps", x.dtype)
    if run is None or _empty(x, filters):
        return False
    found, (n, c, h, w), (p, q) = windows(kernel, stride, pads, dilation, 1), x.shape, out.shape[2:]
    job = _job(tuple(x.shape), out.shape[1], found, _lanes(c), top, exact, len(sizes), *sizes)
    framed = n * (pads[0] + h + pads[2]) * (pads[1] + w + pads[3])
    bytes_ = filters.new_empty(len(sizes) * framed * _lanes(c))
    beyond = x.new_empty(len(sizes) * (framed + n * p * q) if exact else 0)
    x, filters, members, step, shift = _last(x), *(t.contiguous() for t in (filters, members, step, shift))
    run(x.data_ptr(), filters.data_ptr(), members.data_ptr(), step.data_ptr(), shift.data_ptr(), out.data_ptr(),
        bytes_.data_ptr(), beyond.data_ptr(), job.address, get_num_threads())
    return True
