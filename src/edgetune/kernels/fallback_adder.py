"""The adder convolutions in plain torch: tap by tap, so that no tensor has channels, filters and pixels at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetune.kernels.geometry import ceil_div, dense, is_channels_last, memory_format
from edgetune.kernels.meta_adder import OCTET, QUAD, laid_out
from edgetune.kernels.windows import Windows, windows, windows_of

_TILE = 2**22
"""Elements of the largest tensor that is built on the way, where one filter has fewer."""


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pad(x: Tensor, found: Windows, value: float = 0.0) -> Tensor:
    top, left, bottom, right = found.pads
    return F.pad(x, (left, right, top, bottom), value=value)


def _distances(padded: Tensor, weight: Tensor, found: Windows, size: tuple[int, int]) -> Tensor:
    """Sum of |x - w| over taps and channels: padded (n c h w), weight (o i u v) -> (n o p q)."""
    n, (p, q), groups, o = padded.shape[0], size, found.groups, weight.shape[0]
    i = weight.shape[1]
    filters = weight.reshape(groups, o // groups, i, *found.kernel)
    sums = padded.new_zeros((groups, n * p * q, o // groups))
    for u, v in found.taps():
        columns = found.seen(padded, (u, v), p, q).reshape(n, groups, i, p, q).permute(1, 0, 3, 4, 2)
        sums += torch.cdist(columns.reshape(groups, n * p * q, i), filters[..., u, v].contiguous(), p=1)
    return sums.view(groups, n, p, q, o // groups).permute(1, 0, 4, 2, 3).reshape(n, o, p, q)


def adder_conv(x: Tensor, weight: Tensor, stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int],
               groups: int) -> Tensor:
    found = windows_of(x, weight, stride, pads, dilation, groups)
    sums = _distances(_pad(_wide(x), found), _wide(weight), found, found.out_size(*x.shape[2:]))
    order = memory_format(is_channels_last(dense(x)))
    return torch.empty_like(sums, dtype=x.dtype, memory_format=order).copy_(-sums)


def adder_conv_input_gradient(gy: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], pads: Sequence[int],
                              dilation: Sequence[int], groups: int) -> Tensor:
    found = windows_of(x, weight, stride, pads, dilation, groups)
    p, q = found.out_size(*x.shape[2:])
    padded = _pad(_wide(x), found)
    gx = torch.zeros_like(padded)
    n, o, i = x.shape[0], weight.shape[0] // groups, weight.shape[1]
    g = _wide(gy).reshape(n, groups, o, 1, p, q)
    few = max(1, _TILE // max(1, x.shape[1] * n * p * q))
    for tap in found.taps():
        seen = found.seen(padded, tap, p, q).reshape(n, groups, 1, i, p, q)
        w = _wide(weight)[..., tap[0], tap[1]].reshape(1, groups, o, i, 1, 1)
        for first in range(0, o, few):
            slopes = (w[:, :, first : first + few] - seen).clamp_(-1, 1)
            part = (slopes * g[:, :, first : first + few]).sum(2).reshape(n, groups * i, p, q)
            found.seen(gx, tap, p, q).add_(part)
    top, left = found.pads[:2]
    inner = gx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    order = memory_format(is_channels_last(dense(x)))
    return torch.empty_like(inner, dtype=x.dtype, memory_format=order).copy_(inner)


def adder_filters(weight: Tensor, groups: int) -> Tensor:
    o, i, u, v = weight.shape
    o //= groups
    quads, octets = ceil_div(o, QUAD), ceil_div(i, OCTET)
    full = F.pad(weight.reshape(groups, o, i, u * v), (0, 0, 0, octets * OCTET - i, 0, quads * QUAD - o))
    apart = full.view(groups, quads, QUAD, octets, OCTET, u * v)
    return apart.permute(0, 1, 5, 3, 2, 4).reshape(-1).contiguous()


def _weight_of(filters: Tensor, o: int, i: int, found: Windows) -> Tensor:
    """What adder_filters was given: (o i u v)."""
    groups, taps = found.groups, found.kernel[0] * found.kernel[1]
    quads, octets = ceil_div(o // groups, QUAD), ceil_div(i, OCTET)
    apart = filters.view(groups, quads, taps, octets, QUAD, OCTET).permute(0, 1, 4, 3, 5, 2)
    return apart.reshape(groups, quads * QUAD, octets * OCTET, taps)[:, : o // groups, :i].reshape(o, i, *found.kernel)


def adder_conv_u8(x: Tensor, filters: Tensor, out_channels: int, kernel: Sequence[int], stride: Sequence[int],
                  pads: Sequence[int], dilation: Sequence[int], groups: int, pad_value: int) -> Tensor:
    found = windows(kernel, stride, pads, dilation, groups)
    weight = _weight_of(filters, out_channels, x.shape[1] // groups, found)
    # float64 holds the sums exactly
    sums = _distances(_pad(x.double(), found, pad_value), weight.double(), found, found.out_size(*x.shape[2:]))
    return sums.int().contiguous(memory_format=torch.channels_last)


def adder_conv_steps(x: Tensor, filters: Tensor, members: Tensor, step: Tensor, shift: Tensor, sizes: Sequence[int],
                     top: int, exact: bool, kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int],
                     dilation: Sequence[int]) -> Tensor:
    found, x = windows(kernel, stride, pads, dilation, 1), x.contiguous(memory_format=torch.channels_last)
    out, taps = found.out_size(*x.shape[2:]), len(found.taps())
    each = filters.split([laid_out(size, x.shape[1], taps, 1) for size in sizes])
    y = x.new_empty((x.shape[0], len(members), *out)).contiguous(memory_format=torch.channels_last)
    for mine, own, own_shift, own_step in zip(each, members.long().split(list(sizes)), shift.split(list(sizes)), step,
                                              strict=True):
        weight, counted = _weight_of(mine, len(own), x.shape[1], found), x * own_step.reciprocal()
        # float64 holds the sums exactly
        read = _pad(counted.round().clamp(0, top).nan_to_num(0).double(), found)
        sums = _distances(read, weight.double(), found, out).float()
        if exact:
            over = _pad((counted - top).clamp(min=0).sum(1, keepdim=True), found)
            sums = sums + F.conv2d(over, over.new_ones((1, 1, *found.kernel)), None, found.stride, 0, found.dilation)
        y[:, own] = own_shift[:, None, None] - own_step * sums
    return y
