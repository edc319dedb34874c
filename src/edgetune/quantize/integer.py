"""The arithmetic of the quantized network, to the bit: what a microcontroller computes, in torch.

    accumulator   acc = sum (x - zero) * w + b                                   int32, padding counts as x = zero
    multiplier    s = m * 2**-31 * 2**-shift, m in [2**30, 2**31), shift >= 0    two int32 for each s <= 1
    doubling      h = (acc * m + 2**30) >> 31                                    product in 64 bits, floor shift
    requantize    r = h / 2**shift, to the nearest, halves away from zero        int32
    result        y = clamp(r + zero, low, high)                                 int8

This is the double rounding of gemmlowp, TFLite's reference kernels and CMSIS-NN's default. Scales s above 1 are
refused: an output step finer than the accumulator's own shows nothing new, and without left shifts nothing overflows.

Maps travel as int8; what is computed on the way is wider, and exists in parts alone. A convolution in
floats is exact as long as every partial sum is: `sum |w| * max |x - zero| + |b|` below 2**24 lets float32 carry it, in
any order of summation; otherwise float64 does (below 2**53, always true here). Float32 is only taken on a CPU, and
where torch is not told to multiply in something shorter.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from edgetune.errors import EdgetuneError
from edgetune.hosts.conv import convolve
from edgetune.overlap import ConvGeometry
from edgetune.quantize.record import INT8_HIGH, INT8_LOW, Quantization

ADD_SHIFT = 20
"""Bits that a sum's operands gain before they are scaled: 255 * 2**20 fits 28 bits."""

RUN, PART = 2**15, 2**14
"""Numbers that are accumulated at once, and those that are scaled at once: in 64 bits they stay in the cache."""

Place = tuple[slice, slice]
"""Some samples and channels of a map (n c h w)."""

Parts = Iterator[tuple[Place, torch.Tensor]]
"""A map in parts: where, and its int32 numbers there before zero point and clamp."""

FixedPoint = tuple[torch.Tensor, torch.Tensor]
"""Multipliers and right shifts, int64 tensors of one shape."""


def quantize(x: torch.Tensor, how: Quantization) -> torch.Tensor:
    """round(x / scale) + zero point, within int8; halves to the even integer, divided in the type of x."""
    return (x / x.new_tensor(how.scale)).round().add(how.zero_point).clamp(INT8_LOW, INT8_HIGH)


def dequantize(x: torch.Tensor, how: Quantization) -> torch.Tensor:
    """scale * (x - zero point)."""
    return (x - how.zero_point) * how.scale


def fixed_point(scales: torch.Tensor) -> FixedPoint:
    """Multiplier and shift of every scale, float64 of any shape, 0 <= scale <= 1.

    Exactly 1 becomes (2**31 - 1, 0), which leaves every accumulator below 2**30 as it is. Raises EdgetuneError above 1.
    """
    if not bool(((scales >= 0) & (scales <= 1)).all()):
        raise EdgetuneError(f"a scale of {float(scales.max()):g} cannot be a right shift: "
                            "give the layer an output scale no finer than its accumulator's")
    mantissa, exponent = torch.frexp(scales)
    multiplier = (mantissa * 2**31).round().long()
    shift = -exponent.long()
    carried = multiplier == 2**31
    multiplier, shift = torch.where(carried, 2**30, multiplier), torch.where(carried, shift - 1, shift)
    multiplier = torch.where(shift < 0, 2**31 - 1, multiplier)  # the scale 1
    multiplier = torch.where(shift > 31, 0, multiplier)  # less than half a step for any accumulator
    return multiplier, shift.clamp(0, 31)


def requantize(acc: torch.Tensor, by: FixedPoint) -> torch.Tensor:
    """acc * s, rounded twice as defined above: int64 holding int32, broadcast with multiplier and shift."""
    multiplier, shift = by
    high = acc.mul(multiplier).add_(1 << 30).bitwise_right_shift_(31)
    # an arithmetic shift rounds halves up; one less below zero sends them away from it
    less = high.bitwise_right_shift(63).bitwise_and_((shift > 0).long())
    return high.add_((1 << shift) >> 1).sub_(less).bitwise_right_shift_(shift)


def reach(weight: torch.Tensor, bias: torch.Tensor, zero_point: int) -> int:
    """The largest magnitude that a partial sum of the accumulator can have, whatever int8 map comes in."""
    span = max(INT8_HIGH - zero_point, zero_point - INT8_LOW)
    by_filter = weight.to(torch.int64).abs().flatten(1).sum(1) * span + bias.to(torch.int64).abs()
    return int(by_filter.max())


def fits_float32(weight: torch.Tensor, bias: torch.Tensor, zero_point: int) -> bool:
    """Whether float32 carries every partial sum of the accumulator exactly."""
    return reach(weight, bias, zero_point) < 2**24


def accumulate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, zero_point: int,
               geometry: ConvGeometry, small: bool | None = None) -> torch.Tensor:
    """A convolution's int32 accumulators: x (n c h w) integers in any type -> (n o h' w') in an exact float type.

    `small` is what `fits_float32` says, where that is known already.
    """
    small = fits_float32(weight, bias, zero_point) if small is None else small
    carrier = torch.float32 if small and _float32_is_kept(x.device) else torch.float64
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        acc = convolve(x.to(carrier, copy=True).sub_(zero_point), weight.to(carrier), bias.to(carrier), geometry)
    # a no-op for sums; should a library transform its operands, this takes the error away
    return acc.round_()


def _float32_is_kept(device: torch.device) -> bool:
    """Whether a float32 convolution on `device` multiplies in float32, and not in something shorter."""
    of_conv = getattr(getattr(torch.backends.mkldnn, "conv", None), "fp32_precision", "none")
    cpu = device.type in ("cpu", "meta")  # meta foresees a CPU
    return cpu and of_conv in ("none", "ieee") and torch.get_float32_matmul_precision() == "highest"


def conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, zero_point: int, geometry: ConvGeometry,
         by: FixedPoint, small: bool | None = None) -> Parts:
    """A convolution's result before zero point and clamp: x (n c h w) -> (n o h' w').

    `by` is (1 o 1 1), `small` as in `accumulate`.
    """
    rows, columns = geometry.out_hw
    inputs, filters = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    one = filters if geometry.groups > 1 else 1  # channels that can only be computed together
    for samples, channels in _places(len(x), geometry.out_channels, max(rows * columns, weight[:1].numel()), RUN, one):
        groups = slice(channels.start // filters * inputs, -(-channels.stop // filters) * inputs)
        width = channels.stop - channels.start
        part = geometry.model_copy(update={"in_channels": groups.stop - groups.start, "out_channels": width,
                                           "groups": width // filters if geometry.groups > 1 else 1})
        acc = accumulate(x[samples, groups], weight[channels], bias[channels], zero_point, part, small)
        for n, c in _places(len(acc), width, rows * columns, PART):
            at = _shifted(n, samples.start), _shifted(c, channels.start)
            yield at, requantize(acc[n, c].to(torch.int64), (by[0][:, at[1]], by[1][:, at[1]])).to(torch.int32)


def add(x1: torch.Tensor, x2: torch.Tensor, how1: Quantization, how2: Quantization, out: Quantization) -> Parts:
    """x1 + x2 (n c h w) in the scale of `out`, before zero point and clamp.

    Both operands, shifted left by 20 bits, are brought to twice the coarser scale; the sum is brought to the result's.
    """
    by1, by2, last = (fixed_point(torch.tensor(s, dtype=torch.float64)) for s in add_scales(how1, how2, out))

    def side(x: torch.Tensor, how: Quantization, by: FixedPoint) -> torch.Tensor:
        return requantize((x.to(torch.int64) - how.zero_point) << ADD_SHIFT, by)

    for where in _places(len(x1), x1.shape[1], x1[:1, :1].numel(), PART):
        yield where, requantize(side(x1[where], how1, by1) + side(x2[where], how2, by2), last).to(torch.int32)


def _places(samples: int, channels: int, numbers: int, limit: int, together: int = 1) -> Iterator[Place]:
    """A map cut into parts of about `limit`: runs of samples, or runs of channels of one; `numbers` in each channel.

    A run of channels is a multiple of `together`.
    """
    width = min(channels, max(1, limit // max(1, numbers) // together) * together)
    height = max(1, limit // max(1, width * numbers)) if width == channels else 1
    for sample in range(0, samples, height):
        for channel in range(0, channels, width):
            yield slice(sample, min(sample + height, samples)), slice(channel, min(channel + width, channels))


def _shifted(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)


def add_scales(how1: Quantization, how2: Quantization, out: Quantization) -> tuple[float, float, float]:
    """The three scales of an add: of either operand, and of the sum."""
    coarse = 2 * max(how1.scale, how2.scale)
    return how1.scale / coarse, how2.scale / coarse, coarse / (2**ADD_SHIFT * out.scale)


def mean(x: torch.Tensor, how: Quantization, out: Quantization) -> Parts:
    """Mean over each map in the scale of `out`, before zero point and clamp: (n c h w) -> (n c 1 1)."""
    scale = mean_scale(how, out, x.shape[2] * x.shape[3])
    by = fixed_point(torch.tensor(scale, dtype=torch.float64))
    for where in _places(len(x), x.shape[1], x[:1, :1].numel(), PART):
        acc = (x[where].to(torch.int64) - how.zero_point).sum((2, 3), keepdim=True)
        yield where, requantize(acc, by).to(torch.int32)


def mean_scale(how: Quantization, out: Quantization, pixels: int) -> float:
    """The scale from a sum of `pixels` to their mean in the result's integers."""
    return how.scale / (out.scale * pixels)
