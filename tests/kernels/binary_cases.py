"""Cases of the convolutions with one bit a weight: seeded layers, maps and filters."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from edgetune.errors import EdgetuneError
from edgetune.kernels import BinaryLayer, fallback

KERNELS = [(1, 1), (3, 3), (3, 3), (3, 3), (5, 5), (7, 7), (2, 3), (1, 4)]


def _drawn_layer(chosen: random.Random, pad_value: int) -> tuple[BinaryLayer, tuple[int, int, int]]:
    """A layer, and samples, rows and columns of its input."""
    while True:
        groups = chosen.choice([1, 1, 1, 2, 3, 6])
        i, o = chosen.choice([1, 3, 8, 17, 64, 70, 130]), chosen.choice([1, 1, 5, 32, 33, 64, 65, 100, 128])
        kernel, stride = chosen.choice(KERNELS), chosen.choice([(1, 1), (1, 1), (2, 2), (1, 3)])
        pads = [chosen.randint(0, 3) for _ in range(4)]
        dil = chosen.choice([(1, 1), (1, 1), (2, 2), (1, 2)])
        if chosen.random() < 0.2:  # depthwise, up to more channels than are computed at a time
            i, o, groups = 1, 1, chosen.choice([1, 5, 64, 65, 130, 256, 300])
        layer = BinaryLayer(i * groups, o * groups, *kernel, *stride, *pads, *dil, groups, pad_value)
        n, h, w = chosen.choice([0, 1, 1, 2, 3]), chosen.randint(1, 11), chosen.randint(1, 12)
        try:
            p, q = layer.out_size(h, w)
        except EdgetuneError:
            continue
        if layer.products * layer.out_channels * p * q * max(n, 1) < 2e7:
            return layer, (n, h, w)


def _spread(x: Tensor, chosen: random.Random) -> Tensor:
    """The same numbers in another memory order."""
    kind = chosen.choice(["contiguous", "last", "sliced"]) if x.dim() == 4 else "sliced"
    if kind == "last":
        return x.contiguous(memory_format=torch.channels_last)
    return torch.stack([x, x], -1)[..., 0] if kind == "sliced" else x


def sign_pack(chosen: random.Random) -> tuple[Any, ...]:
    shape = (chosen.choice([0, 1, 2]), chosen.choice([1, 5, 32, 40, 64, 80, 100, 128, 300]), chosen.randint(1, 9),
             chosen.choice([1, 7, 30, 70]))
    x = torch.randn(shape).to(chosen.choice([torch.float32, torch.float32, torch.float32, torch.float64,
                                             torch.bfloat16]))
    for value in (0.0, -0.0, float("nan"), float("inf"), -float("inf")):
        x[torch.rand(shape) < 0.03] = value
    return (_spread(x, chosen),)


def sign_unpack(chosen: random.Random) -> tuple[Any, ...]:
    (x,) = sign_pack(chosen)
    return _spread(fallback.sign_pack(x), chosen), x.shape[1]


def _plain_bits(layer: BinaryLayer) -> Tensor:
    shape = layer.out_channels, layer.channels // layer.groups, layer.kernel_h, layer.kernel_w
    return fallback.sign_pack(torch.randn(shape).round())  # many zeros


def arrange_filters(chosen: random.Random) -> tuple[Any, ...]:
    layer, _ = _drawn_layer(chosen, 0)
    return _spread(_plain_bits(layer), chosen), layer.channels, layer.groups


def _filters(layer: BinaryLayer) -> Tensor:
    return fallback.arrange_filters(_plain_bits(layer), layer.channels, layer.groups)


def _affine(chosen: random.Random, channels: int, shape: tuple[int, ...]) -> list[Tensor | None]:
    """Eighths, so that nothing is rounded and signs are right in every order of adding up."""
    def drawn(*size: int) -> Tensor | None:
        return _spread(torch.randint(-40, 40, size) / 8, chosen) if chosen.random() < 0.6 else None

    return [drawn(channels), drawn(channels), drawn(*shape)]


def _binary(chosen: random.Random) -> tuple[BinaryLayer, Tensor, Tensor, list[Tensor | None]]:
    layer, (n, h, w) = _drawn_layer(chosen, chosen.choice([-1, 0, 0, 1]))
    bits = fallback.sign_pack(torch.randn(n, layer.channels, h, w))
    return layer, _spread(bits, chosen), _filters(layer), _affine(chosen, layer.out_channels, _out_shape(layer, bits))


def _out_shape(layer: BinaryLayer, bits: Tensor) -> tuple[int, ...]:
    return bits.shape[0], layer.out_channels, *layer.out_size(*bits.shape[1:3])


def binary_conv(chosen: random.Random) -> tuple[Any, ...]:
    layer, bits, filters, (scale, _, _) = _binary(chosen)
    return bits, filters, scale, list(layer)


def binary_conv_clip(chosen: random.Random) -> tuple[Any, ...]:
    layer, bits, filters, (scale, _, _) = _binary(chosen)
    return bits, filters, scale, *_clip(chosen, _out_shape(layer, bits)), list(layer)


def binary_conv_sign(chosen: random.Random) -> tuple[Any, ...]:
    layer, bits, filters, _ = _binary(chosen)
    threshold = torch.randint(-20, 20, (layer.out_channels,), dtype=torch.int32)
    for value in (-(2**31), 2**31 - 1):
        threshold[torch.rand(threshold.shape) < 0.1] = value
    flip = torch.rand(threshold.shape) < 0.5 if chosen.random() < 0.6 else None
    return bits, filters, threshold, flip, list(layer)


def affine_clip(chosen: random.Random) -> tuple[Any, ...]:
    (x,) = sign_pack(chosen)
    x = (x.nan_to_num(0.5, 3.0, -3.0) * 64).round().float() / 64
    return x, *_clip(chosen, tuple(x.shape))


def _clip(chosen: random.Random, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """What follows a map of that shape value by value."""
    gain, shift, residual = _affine(chosen, shape[1], shape)
    if gain is None or shift is None:
        gain = shift = None
    whole = chosen.random() < 0.7
    low, high = chosen.choice([(-1.0, 1.0), (0.0, float("inf")), (0.0, 6.0), (-float("inf"), float("inf"))])
    return gain, shift, residual, low, high, whole, not whole or chosen.random() < 0.6


def bit_weight_conv(chosen: random.Random) -> tuple[Any, ...]:
    layer, (n, h, w) = _drawn_layer(chosen, chosen.choice([0, 128, 255]))
    x = torch.randint(0, 256, (n, layer.channels, h, w), dtype=torch.uint8)
    affine = _affine(chosen, layer.out_channels, (n, layer.out_channels, *layer.out_size(h, w)))
    return _spread(x, chosen), _filters(layer), *(affine if chosen.random() < 0.7 else [None] * 3), list(layer)
