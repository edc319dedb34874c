"""Integer networks in plain Python numbers, one value after the other: slow, obvious, without any float tensor.

Rounding is written as gemmlowp states it (a nudge and a truncating division, a remainder and a threshold), which is
another form than the one under test.
"""

from __future__ import annotations

import math

import numpy as np

from edgetune.quantize.record import Add, Conv, Linear, Mean, Pad, Quantization, Quantized, Subsample


def multiplier(scale: float) -> tuple[int, int]:
    """(m, shift) with scale = m * 2**-31 * 2**-shift."""
    if scale == 1:
        return 2**31 - 1, 0
    mantissa, exponent = math.frexp(scale)
    m = round(mantissa * 2**31)
    if m == 2**31:
        m, exponent = m // 2, exponent + 1
    if exponent > 0:
        return 2**31 - 1, 0
    return (0, 0) if -exponent > 31 else (m, -exponent)


def doubling_high(a: int, b: int) -> int:
    """The upper half of 2 a b, to the nearest."""
    product = a * b
    nudge = 2**30 if product >= 0 else 1 - 2**30
    total = product + nudge
    return total // 2**31 if total >= 0 else -(-total // 2**31)


def divide(x: int, exponent: int) -> int:
    """x / 2**exponent, halves away from zero."""
    mask = 2**exponent - 1
    remainder, threshold = x & mask, (mask >> 1) + (1 if x < 0 else 0)
    return (x >> exponent) + (1 if remainder > threshold else 0)


def requantize(acc: int, scale: float) -> int:
    """acc * scale as an integer."""
    assert -(2**31) <= acc < 2**31
    m, shift = multiplier(scale)
    return divide(doubling_high(acc, m), shift)


def conv(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, zero: int, geometry) -> np.ndarray:
    """Accumulators (n o h' w') of integers x (n c h w), tap by tap; pixels outside are not visited."""
    (rows, columns), (top, _, left, _) = geometry.out_hw, geometry.pads
    out_per_group = geometry.out_channels // geometry.groups
    in_per_group = geometry.in_channels // geometry.groups
    acc = np.zeros((len(x), geometry.out_channels, rows, columns), dtype=object)
    for n, o, p, q in np.ndindex(*acc.shape):
        total = int(bias[o])
        for i, u, v in np.ndindex(*weight.shape[1:]):
            row = geometry.stride[0] * p + geometry.dilation[0] * u - top
            column = geometry.stride[1] * q + geometry.dilation[1] * v - left
            if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                channel = o // out_per_group * in_per_group + i
                total += (int(x[n, channel, row, column]) - zero) * int(weight[o, i, u, v])
        acc[n, o, p, q] = total
    return acc


def _each(function, *maps: np.ndarray) -> np.ndarray:
    out = np.empty(maps[0].shape, dtype=object)
    for index in np.ndindex(*out.shape):
        out[index] = function(*(int(each[index]) for each in maps))
    return out


def _clamped(before: np.ndarray, layer) -> np.ndarray:
    return _each(lambda v: min(max(v + layer.out.zero_point, layer.low), layer.high), before)


def add(x1: np.ndarray, x2: np.ndarray, how1: Quantization, how2: Quantization, out: Quantization) -> np.ndarray:
    """The sum in the integers of `out`, before zero point and clamp."""
    coarse = 2 * max(how1.scale, how2.scale)

    def one(a: int, b: int) -> int:
        left = requantize((a - how1.zero_point) * 2**20, how1.scale / coarse)
        right = requantize((b - how2.zero_point) * 2**20, how2.scale / coarse)
        return requantize(left + right, coarse / (2**20 * out.scale))

    return _each(one, x1, x2)


def run(quantized: Quantized, x: np.ndarray) -> np.ndarray:
    """The network on float32 pictures x (n c h w), up to the last map in integers or the head's float64 logits."""
    graph, tensors = quantized.graph, {key: t.numpy() for key, t in quantized.tensors.items()}
    first = np.rint(x / np.float32(graph.input.scale)).astype(np.int64) + graph.input.zero_point
    maps = {"input": np.clip(first, -128, 127)}
    for layer in graph.layers:
        xs = [maps[name] for name in layer.sources]
        hows = [graph.quantization(name) for name in layer.sources]
        match layer:
            case Conv():
                weight, bias = tensors[f"{layer.name}.weight"], tensors[f"{layer.name}.bias"]
                scales = hows[0].scale * tensors[f"{layer.name}.weight_scale"] / layer.out.scale
                acc = conv(xs[0], weight, bias, hows[0].zero_point, layer.geometry)
                scaled = [_each(lambda v, s=float(s): requantize(v, s), acc[:, o]) for o, s in enumerate(scales)]
                maps[layer.name] = _clamped(np.stack(scaled, 1), layer)
            case Add():
                maps[layer.name] = _clamped(add(*xs, *hows, layer.out), layer)
            case Mean():
                sums = (xs[0] - hows[0].zero_point).sum((2, 3), keepdims=True)
                scale = hows[0].scale / (layer.out.scale * xs[0].shape[2] * xs[0].shape[3])
                maps[layer.name] = _clamped(_each(lambda v, s=scale: requantize(v, s), sums), layer)
            case Subsample():
                maps[layer.name] = xs[0][:, :, :: layer.stride[0], :: layer.stride[1]]
            case Pad():
                width = ((0, 0), (layer.before, layer.after), (0, 0), (0, 0))
                maps[layer.name] = np.pad(xs[0], width, constant_values=layer.out.zero_point)
            case Linear():
                features = (xs[0] - hows[0].zero_point).astype(np.float64).reshape(len(x), -1) * hows[0].scale
                weight = tensors[f"{layer.name}.weight"].astype(np.float64)
                maps[layer.name] = features @ weight.T + tensors[f"{layer.name}.bias"]
    return maps[graph.layers[-1].name]
