"""Seeded arguments of the adder convolutions: layers of every kind, in every layout."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgetune import kernels
from edgetune.kernels import fallback
from edgetune.kernels.windows import windows

# groups, filters and channels of each: odd ones, whole vectors, one channel a group, many
CHANNELS = [(1, 1, 1), (1, 16, 16), (1, 7, 3), (1, 33, 21), (3, 5, 7), (2, 12, 8), (13, 1, 1), (16, 1, 1), (4, 3, 1),
            (1, 5, 130), (5, 1, 4)]
KERNELS = [(1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (2, 4), (1, 3), (7, 1)]
MAPS = [(1, 7, 7), (2, 7, 9), (0, 8, 8), (3, 1, 1), (1, 14, 14), (2, 5, 12), (1, 23, 30)]

Geometry = tuple[list[int], list[int], list[int], int]


def _layout(x: Tensor, chosen: random.Random) -> Tensor:
    kind = chosen.choice(["contiguous", "last", "last", "unaligned", "sliced"])
    if kind == "last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "unaligned" and x.numel():
        return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    return torch.stack([x, x], -1)[..., 0] if kind == "sliced" else x


def _layer(chosen: random.Random) -> tuple[tuple[int, ...], tuple[int, ...], Geometry]:
    """Shapes of x and weight, and the geometry of a window that fits."""
    groups, o, i = chosen.choice(CHANNELS)
    while True:
        (n, h, w), kernel = chosen.choice(MAPS), chosen.choice(KERNELS)
        stride, dilation = [[chosen.choice(sizes) for _ in range(2)] for sizes in ([1, 1, 2, 3], [1, 1, 2])]
        pads = [chosen.randint(0, 3) for _ in range(4)] if chosen.random() < 0.7 else [0, 0, 0, 0]
        if all(size + pads[k] + pads[k + 2] > dilation[k] * (kernel[k] - 1) for k, size in enumerate((h, w))):
            return (n, groups * i, h, w), (groups * o, i, *kernel), (stride, pads, dilation, groups)


def _numbers(shape: tuple[int, ...], dtype: torch.dtype, chosen: random.Random, odd: bool = False) -> Tensor:
    x = torch.randn(shape) * 2
    if odd and x.numel():
        for value in (float("nan"), float("inf")):
            x.view(-1)[torch.randint(0, x.numel(), (1,))] = value
    return _layout(x.to(dtype), chosen)


def _float(chosen: random.Random) -> torch.dtype:
    return chosen.choice([torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16])


def adder_conv(chosen: random.Random) -> tuple[Any, ...]:
    x, weight, geometry = _layer(chosen)
    dtype = _float(chosen)
    return _numbers(x, dtype, chosen, chosen.random() < 0.3), _numbers(weight, dtype, chosen), *geometry


def adder_conv_input_gradient(chosen: random.Random) -> tuple[Any, ...]:
    x, weight, *geometry = adder_conv(chosen)
    size = windows(weight.shape[2:], *geometry).out_size(*x.shape[2:])
    # small ones: sums of many slopes that cancel are compared in float32
    gy = torch.randn(x.shape[0], weight.shape[0], *size) / 8
    return _layout(gy.to(x.dtype), chosen), x, weight, *geometry


def adder_filters(chosen: random.Random) -> tuple[Any, ...]:
    _, weight, geometry = _layer(chosen)
    return _layout(torch.randint(0, 256, weight, dtype=torch.uint8), chosen), geometry[3]


def adder_conv_u8(chosen: random.Random) -> tuple[Any, ...]:
    x, weight, geometry = _layer(chosen)
    filters = fallback.adder_filters(torch.randint(0, 256, weight, dtype=torch.uint8), geometry[3])
    return (_layout(torch.randint(0, 256, x, dtype=torch.uint8), chosen), filters, weight[0], list(weight[2:]),
            *geometry, chosen.choice([0, 0, 128, 255]))


def adder_conv_steps(chosen: random.Random) -> tuple[Any, ...]:
    x, (o, i, *kernel), (stride, pads, dilation, _) = _layer(chosen)
    sizes = [o]
    while sizes[-1] > 1 and chosen.random() < 0.6:
        first = chosen.randint(1, sizes[-1] - 1)
        sizes[-1:] = [first, sizes[-1] - first]
    shape, top = (x[0], i, *x[2:]), chosen.choice([3, 15, 127, 255])
    filters = torch.cat([fallback.adder_filters(torch.randint(0, top + 1, (size, i, *kernel), dtype=torch.uint8), 1)
                         for size in sizes])
    members = torch.randperm(o).to(torch.int32)
    values = _numbers(shape, torch.float32, chosen, chosen.random() < 0.2)
    step = (torch.rand(len(sizes)) + 0.2) * 3 / top
    return (values, filters, members, step, torch.randn(2 * o)[::2], sizes, top, chosen.random() < 0.7, kernel, stride,
            pads, dilation)


ALL = adder_conv, adder_conv_input_gradient, adder_filters, adder_conv_u8, adder_conv_steps


def _wrong() -> list[Callable[[], Tensor]]:
    x, w, b, one = torch.ones(1, 4, 5, 5), torch.ones(3, 4, 3, 3), torch.zeros(1, 4, 5, 5, dtype=torch.uint8), [1, 1]
    f, no = torch.zeros(9 * 32, dtype=torch.uint8), [0] * 4
    conv, many = kernels.adder_conv, torch.zeros(1, dtype=torch.uint8)
    three, one_step, order = torch.ones(3), torch.ones(1), torch.arange(3, dtype=torch.int32)

    def steps(x: Tensor, filters: Tensor, members: Tensor, step: Tensor, shift: Tensor, sizes: list[int],
              top: int) -> Tensor:
        return kernels.adder_conv_steps(x, filters, members, step, shift, sizes, top, True, [3, 3], one, no, one)

    return [lambda: conv(x[0], w, one, no, one), lambda: conv(x, w[:, :3], one, no, one),
            lambda: conv(x, w, one, no, one, 3), lambda: conv(x, w, one, [0, 0], one),
            lambda: conv(x, w, [0, 1], no, one), lambda: conv(x, w, one, [-1, 0, 0, 0], one),
            lambda: conv(x, w, one, no, [3, 1]),
            lambda: conv(x, w.double(), one, no, one), lambda: conv(b, b, one, no, one),
            lambda: kernels.adder_conv_input_gradient(x, x, w, one, no, one),
            lambda: kernels.adder_conv_input_gradient(x.double()[:, :3, 2:, 2:], x, w, one, no, one),
            lambda: kernels.adder_filters(w), lambda: kernels.adder_filters(w.byte(), 2),
            lambda: kernels.adder_conv_u8(x, f, 3, [3, 3], one, no, one),
            lambda: kernels.adder_conv_u8(b, f[1:], 3, [3, 3], one, no, one),
            lambda: kernels.adder_conv_u8(b, f, 3, [3, 3], one, no, one, 1, 256),
            lambda: kernels.adder_conv_u8(b, f.float(), 3, [3, 3], one, no, one),
            lambda: steps(x, f, order, one_step, three, [3], 0),
            lambda: steps(x, f, order, one_step, three, [3], 256),
            lambda: steps(x, f[1:], order, one_step, three, [3], 9),
            lambda: steps(x, f, order, three, three, [3], 9),
            lambda: steps(x, f, order, three[:0], three, [], 9),
            lambda: steps(x, f, order, three[:2], three, [3, 0], 9),
            lambda: steps(x, f, order[:2], one_step, three, [3], 9),
            lambda: steps(x[0], f, order, one_step, three, [3], 9),
            lambda: steps(x, f, order, one_step, three[:2], [3], 9),
            lambda: steps(x, f, order.long(), one_step, three, [3], 9),
            lambda: steps(x.double(), f, order, one_step, three, [3], 9),
            lambda: steps(x, f, order, one_step.half(), three, [3], 9),
            lambda: kernels.adder_conv_u8(many.expand(1, 2**20, 3, 3), many.expand(9 * 2**22), 3, [3, 3], one, no, one)]


WRONG = _wrong()
"""Calls that every version refuses."""
