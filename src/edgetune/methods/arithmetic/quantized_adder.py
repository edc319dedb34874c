"""Adder layers in integers: filters in groups of one scale each, ranges clamped without loss, 4 to 8 bits.

What it does
    |a x - b w| does not factor, so an adder layer's input and weights must share one scale, and one of both loses. Here
    filters are put into groups by their largest weight, and every group has a scale of its own. Where a group's weights
    go beyond what the input reaches (`range`), they are clamped, which takes the same from every answer of a filter: a
    bias gives it back. With `exact`, inputs that are clamped lose nothing either: what lies beyond the scale is summed
    once over each window and taken from all filters of the group alike.

Shapes
    x (n c h w) of a ReLU, weight (o i u v), y (n o p q); scale (groups)

What is kept (bytes)
    4 n c h w in training, as AdderNet. Packed: `bits` a weight.

What changes in the gradient or the answer
    With scale s of a group, da = s / (2^b - 1), dw = 2 da: y = -da sum |round(x / da) - 2 round(w / dw)| + bias
    - sum max(x - s, 0), bias = -sum max(|w| - s, 0). Rounding is all that is lost. Gradients are AdderNet's, at the
    numbers before rounding. With at most 7 bits all operands fit in bytes, and sums of absolute differences of bytes
    are one instruction.

When not to use
    Behind anything but a ReLU: inputs below 0 count as 0. Norms must be estimated anew afterwards
    (`edgetune.compress.estimate_norms`). Until `range` has been fitted, every batch has the range of its own inputs.

Reference
    Nie et al., "Redistribution of Weights and Activations for AdderNet Quantization", NeurIPS 2022. The exact clamp of
    activations is not in the paper: for |w| <= s and x > s, |x - w| = (x - s) + |s - w|. Its k-means over filters is in
    one dimension, and is done there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field

from edgetune import kernels
from edgetune.contract import ArithmeticMethod
from edgetune.graph import Call
from edgetune.hosts.adder import adder
from edgetune.overlap import ConvGeometry

ROUNDS = 30
"""Of k-means at most."""
OUTLIERS = 0.9997**2
"""Share of a batch's absolute inputs that lies within the range, as released."""
LEAST_RANGE = 1e-3
BYTE_BITS = 7
"""Most bits with which all operands fit in bytes."""


class Group(NamedTuple):
    """Filters of one scale: which, their weights in steps of 2 da (whole numbers), da, and what the clamp took."""

    members: torch.Tensor
    steps: torch.Tensor
    step: float
    bias: torch.Tensor


def clusters(values: torch.Tensor, count: int) -> torch.Tensor:
    """Which of at most `count` groups each of the values (o) belongs to: k-means in one dimension, (o) int64.

    Begins at evenly spaced quantiles; equal values are in one group.
    """
    if not len(values):
        return values.long()
    centres = values.double().unique()
    if len(centres) > count:
        centres = values.double().quantile(torch.linspace(0.5 / count, 1 - 0.5 / count, count, dtype=torch.float64))
        for _ in range(ROUNDS):
            nearest = (values.double()[:, None] - centres).abs().argmin(1)
            members = F.one_hot(nearest, len(centres)).double()
            sizes = members.sum(0)
            moved = torch.where(sizes > 0, (members * values.double()[:, None]).sum(0) / sizes.clamp(min=1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved
    return (values.double()[:, None] - centres).abs().argmin(1)


def redistribute(weight: torch.Tensor, bits: int, groups: int, reach: float) -> Iterator[Group]:
    """The groups of weight (o i u v), for inputs from 0 to `reach`."""
    largest = weight.abs().amax((1, 2, 3)) if weight.numel() else weight.new_zeros(len(weight))
    which, top = clusters(largest, groups), 2**bits - 1
    for number in which.unique().tolist():
        members = (which == number).nonzero().flatten()
        own, most = weight[members], max(float(largest[members].max()), LEAST_RANGE)
        scale = min(reach, most)
        step = scale / top
        steps = (own.clamp(-scale, scale) / (2 * step)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        yield Group(members, steps, step, -(own.abs() - scale).clamp(min=0).sum((1, 2, 3)))


def beyond(x: torch.Tensor, scale: float, geometry: ConvGeometry) -> torch.Tensor:
    """(n p q): the sum over windows and channels of what of x (n c h w) lies beyond the scale."""
    top, bottom, left, right = geometry.pads
    over = F.pad((x - scale).clamp(min=0).sum(1, keepdim=True), (left, right, top, bottom))
    return F.conv2d(over, over.new_ones((1, 1, *geometry.kernel)), None, geometry.stride, 0, geometry.dilation)[:, 0]


def reach_of(x: torch.Tensor) -> float:
    """What nearly all absolute values of x stay below."""
    values = x.detach().abs().flatten()
    if not len(values):
        return LEAST_RANGE
    return max(float(values.kthvalue(max(1, int(OUTLIERS * len(values)))).values), LEAST_RANGE)


class QuantizedAdder(ArithmeticMethod):
    """Of one layer; `range` is what `fitted` finds."""

    method = "quantized_adder"

    bits: int = Field(8, ge=2, le=8, description="of a weight and of what is read")
    groups: int = Field(4, ge=1, description="of filters with a scale each, at most")
    range: float | None = Field(None, gt=0, description="what the layer's input reaches, outliers left out")
    exact: bool = Field(True, description="whether inputs beyond their scale count in full")

    @property
    def weight_bits(self) -> int:
        return self.bits

    @property
    def activation_bits(self) -> int:
        return self.bits

    @property
    def label(self) -> str:
        return f"quantized adder, {self.bits} bits"

    def refuse(self, call: Call) -> str | None:
        if call.geometry is not None and call.geometry.groups > 1:
            return "has groups of channels, whose scales would be apart: leave it an adder layer in float"
        return super().refuse(call)

    def fitted(self, x: torch.Tensor) -> QuantizedAdder:
        return self.model_copy(update={"range": max(reach_of(x), self.range or 0.0)})

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                 progress: torch.Tensor) -> torch.Tensor:
        if x.is_meta:  # scales are numbers, which a shape has not
            return adder(x, weight, geometry)
        with torch.no_grad():
            answer = self.quantized(x, weight, geometry)
        if not torch.is_grad_enabled():
            return answer
        y = adder(x, weight, geometry)
        return y + (answer - y).detach()

    def quantized(self, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        """The layer's answer y (n o p q), by integers."""
        y = x.new_empty((len(x), geometry.out_channels, *geometry.out_hw))
        for group in redistribute(weight, self.bits, self.groups, self.range or reach_of(x)):
            y[:, group.members] = self._answer(x, group, geometry).to(y.dtype)
        return y

    def _answer(self, x: torch.Tensor, group: Group, geometry: ConvGeometry) -> torch.Tensor:
        top, bottom, left, right = geometry.pads
        how = (geometry.stride, (top, left, bottom, right), geometry.dilation, 1)
        levels, o = 2**self.bits, len(group.members)
        read = (x / group.step).round().clamp(0, levels - 1)
        over = beyond(x, group.step * (levels - 1), geometry) if self.exact else None
        if self.bits > BYTE_BITS:
            y = group.step * kernels.adder_conv(read, 2 * group.steps, *how) + group.bias.view(-1, 1, 1)
            return y if over is None else y - over[:, None]
        # with `levels` added to both, steps from -levels to levels - 2 and inputs from 0 are bytes
        filters = kernels.adder_filters((2 * group.steps + levels).to(torch.uint8), 1)
        bytes_ = (read + levels).to(torch.uint8).contiguous(memory_format=torch.channels_last)
        scale = torch.full((o,), -group.step)
        more = None if over is None else (over / group.step).float()
        return kernels.adder_conv_u8_scaled(bytes_, filters, scale, group.bias.float(), more, geometry.kernel, *how,
                                            levels)
