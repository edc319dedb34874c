"""The adder convolutions by unfolding, in float64: every difference is one element of one large tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def columns(x: Tensor, kernel: list[int], stride: list[int], pads: list[int], dilation: list[int], groups: int,
            value: float = 0.0) -> Tensor:
    """x (n c h w) -> (n groups 1 i*u*v l), l output pixels; differentiable."""
    top, left, bottom, right = pads
    padded = F.pad(x.double(), (left, right, top, bottom), value=value)
    unfolded = F.unfold(padded, kernel, dilation, 0, stride)
    return unfolded.view(x.shape[0], groups, 1, unfolded.shape[1] // groups, -1)


def filters_of(weight: Tensor, groups: int) -> Tensor:
    """weight (o i u v) -> (1 groups o i*u*v 1)."""
    return weight.double().reshape(1, groups, weight.shape[0] // groups, -1, 1)


def slow_adder_conv(x: Tensor, weight: Tensor, stride: list[int], pads: list[int], dilation: list[int],
                    groups: int) -> Tensor:
    apart = columns(x, list(weight.shape[2:]), stride, pads, dilation, groups) - filters_of(weight, groups)
    return -_as_map(apart.abs().sum(3), x, list(weight.shape[2:]), stride, pads, dilation)


def slow_adder_conv_input_gradient(gy: Tensor, x: Tensor, weight: Tensor, stride: list[int], pads: list[int],
                                   dilation: list[int], groups: int) -> Tensor:
    """Every column gets its clipped slopes; autograd of the unfolding adds them up where they came from."""
    leaf = x.double().requires_grad_()
    unfolded = columns(leaf, list(weight.shape[2:]), stride, pads, dilation, groups)
    slopes = (filters_of(weight, groups) - unfolded.detach()).clamp(-1, 1)
    g = gy.double().reshape(x.shape[0], groups, weight.shape[0] // groups, 1, -1)
    return torch.autograd.grad(unfolded, leaf, (slopes * g).sum(2, keepdim=True))[0]


def slow_adder_filters(weight: Tensor, groups: int) -> Tensor:
    """Byte by byte."""
    (o, i, ku, kv), out = weight.shape, []
    mine = o // groups
    for group in range(groups):
        for quad in range(0, mine, 4):
            for u, v in [(u, v) for u in range(ku) for v in range(kv)]:
                for octet in range(0, i, 8):
                    for f, c in [(quad + f, octet + c) for f in range(4) for c in range(8)]:
                        out.append(int(weight[group * mine + f, c, u, v]) if f < mine and c < i else 0)
    return torch.tensor(out, dtype=torch.float64)


def slow_adder_conv_u8(x: Tensor, filters: Tensor, out_channels: int, kernel: list[int], stride: list[int],
                       pads: list[int], dilation: list[int], groups: int, pad_value: int) -> Tensor:
    i, o, taps = x.shape[1] // groups, out_channels // groups, kernel[0] * kernel[1]
    weight = torch.zeros(groups, o, i, taps, dtype=torch.float64)
    apart = filters.view(groups, (o + 3) // 4, taps, (i + 7) // 8, 4, 8)
    for f in range(o):
        for c in range(i):
            weight[:, f, c] = apart[:, f // 4, :, c // 8, f % 4, c % 8]
    unfolded = columns(x, kernel, stride, pads, dilation, groups, pad_value)
    sums = (unfolded - weight.view(1, groups, o, -1, 1)).abs().sum(3)
    return _as_map(sums, x, kernel, stride, pads, dilation)


def slow_adder_conv_steps(x: Tensor, filters: Tensor, members: Tensor, step: Tensor, shift: Tensor, sizes: list[int],
                          top: int, exact: bool, *windows: list[int]) -> Tensor:
    """Group by group; steps are counted in float32, where it is defined which of two is nearer."""
    (kernel, stride, pads, dilation), parts = windows, dict[int, Tensor]()
    taps, at = kernel[0] * kernel[1], [0, 0]
    for size, one in zip(sizes, step, strict=True):
        length = (size + 3) // 4 * taps * ((x.shape[1] + 7) // 8) * 32
        counted = x.float() * one.reciprocal()
        read, own = counted.round().clamp(0, top).nan_to_num(0), filters[at[0]:at[0] + length]
        sums = slow_adder_conv_u8(read, own, size, kernel, stride, pads, dilation, 1, 0)
        over = columns((counted - top).clamp(min=0), kernel, stride, pads, dilation, 1).sum((1, 2, 3))
        sums = sums + over.reshape(len(x), 1, *sums.shape[2:]) if exact else sums
        for k in range(size):
            parts[int(members[at[1] + k])] = shift[at[1] + k].double() - one.double() * sums[:, k]
        at = [at[0] + length, at[1] + size]
    return torch.stack([parts[channel] for channel in range(len(members))], 1)


def _as_map(sums: Tensor, x: Tensor, kernel: list[int], stride: list[int], pads: list[int],
            dilation: list[int]) -> Tensor:
    """(n groups o l) -> (n o p q)."""
    p, q = ((x.shape[2 + k] + pads[k] + pads[k + 2] - dilation[k] * (kernel[k] - 1) - 1) // stride[k] + 1
            for k in range(2))
    return sums.reshape(x.shape[0], -1, p, q)
