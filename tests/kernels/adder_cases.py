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


def adder_conv_u8_scaled(chosen: random.Random) -> tuple[Any, ...]:
    x, filters, o, kernel, *geometry, value = adder_conv_u8(chosen)
    p, q = windows(kernel, *geometry).out_size(*x.shape[2:])
    more = torch.rand(x.shape[0], p, q) * 100 if chosen.random() < 0.6 else None
    return x, filters, torch.randn(2 * o)[::2] / 1000, torch.randn(o), more, kernel, *geometry, value


ALL = adder_conv, adder_conv_input_gradient, adder_filters, adder_conv_u8, adder_conv_u8_scaled


def _wrong() -> list[Callable[[], Tensor]]:
    x, w, b, one = torch.ones(1, 4, 5, 5), torch.ones(3, 4, 3, 3), torch.zeros(1, 4, 5, 5, dtype=torch.uint8), [1, 1]
    f, no = torch.zeros(9 * 32, dtype=torch.uint8), [0] * 4
    conv, many, scaled = kernels.adder_conv, torch.zeros(1, dtype=torch.uint8), kernels.adder_conv_u8_scaled
    three, half = torch.ones(3), torch.ones(1, 3, 3, dtype=torch.float16)
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
            lambda: scaled(b, f, three, torch.ones(4), None, [3, 3], one, no, one),
            lambda: scaled(b, f, three, three, torch.ones(1, 3, 2), [3, 3], one, no, one),
            lambda: scaled(b, f, three, three, half, [3, 3], one, no, one),
            lambda: kernels.adder_conv_u8(many.expand(1, 2**20, 3, 3), many.expand(9 * 2**22), 3, [3, 3], one, no, one)]


WRONG = _wrong()
"""Calls that every version refuses."""
