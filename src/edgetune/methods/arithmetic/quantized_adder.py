"""Adder layers in integers: filters in groups of one scale each, ranges clamped without loss, 2 to 8 bits.

What it does
    |a x - b w| does not factor, so an adder layer's input and weights must share one scale, and one of both loses. Here
    filters are put into groups by their largest weight, and every group has a scale of its own. Where a group's weights
    go beyond what the input reaches (`range`), they are clamped, which takes the same from every answer of a filter: a
    bias gives it back. So are weights below 0, as an input behind a ReLU is never there. With `exact`, inputs that are
    clamped lose nothing either: what lies beyond the scale is summed once over each window and taken from all filters
    of the group alike.

Shapes
    x (n c h w) of a ReLU, weight (o i u v), y (n o p q); scale (groups)

What is kept (bytes)
    4 n c h w in training, as AdderNet. Packed: `bits` a weight.

What changes in the gradient or the answer
    With scale s of a group and d = s / (2^b - 1): y = -d sum |round(x / d) - round(w / d)| + bias - sum max(x - s, 0),
    bias = -sum max(w - s, 0) - sum max(-w, 0), x and w clamped to 0 .. s. Rounding is all that is lost. Gradients are
    AdderNet's, at the numbers before rounding. All operands fit in bytes, and sums of absolute differences of bytes are
    one instruction.

When not to use
    Behind anything but a ReLU: inputs below 0 count as 0. Until `range` has been fitted, every batch
    has the range of its own inputs, and norms must be estimated anew afterwards: `edgetune compress` does both at the
    end of a training, `edgetune.compress.quantize_layers` with a trained adder network.

Reference
    Nie et al., "Redistribution of Weights and Activations for AdderNet Quantization", NeurIPS 2022. Two clamps are not
    in the paper: of activations, |x - w| = (x - s) + |s - w| for w <= s < x, and of weights below 0, |x - w| = x + |w|
    for x >= 0. The paper keeps those weights, in signed steps twice as long as the input's (2 d). Its k-means over
    filters is in one dimension, and is done there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field

from edgetune.contract import ArithmeticMethod
from edgetune.graph import Call
from edgetune.hosts.adder import RECIPE, adder
from edgetune.hosts.adder_integers import Steps, answer, arranged
from edgetune.overlap import ConvGeometry

ROUNDS = 30
"""Of k-means at most."""
OUTLIERS = 0.9997**2
"""Share of a batch's absolute inputs that lies within the range, as released."""
LEAST_RANGE = 1e-3
MOST_GROUPS = 256
"""As many as a byte tells apart."""


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


def redistribute(weight: torch.Tensor, bits: int, groups: int, reach: float) -> Steps:
    """weight (o i u v) in groups, for inputs from 0 to `reach`."""
    weight, top = weight.detach().float(), 2**bits - 1
    largest = weight.amax((1, 2, 3)) if weight.numel() else weight.new_zeros(len(weight))
    found, group = clusters(largest, groups).unique(return_inverse=True)
    most = largest.new_zeros(len(found)).scatter_reduce(0, group, largest, "amax")
    step = most.clamp(LEAST_RANGE, max(reach, LEAST_RANGE)) / top
    own = step[group].view(-1, 1, 1, 1)
    steps = (weight * own.reciprocal()).round().clamp(0, top).to(torch.uint8)
    return Steps(steps, group, step, -(weight - weight.clamp(min=0).minimum(own * top)).abs().sum((1, 2, 3)))


def reach_of(x: torch.Tensor) -> float:
    """What nearly all absolute values of x stay below."""
    values = x.detach().abs().flatten()
    if not len(values):
        return LEAST_RANGE
    return max(float(values.kthvalue(max(1, int(OUTLIERS * len(values)))).values), LEAST_RANGE)


class QuantizedAdder(ArithmeticMethod):
    """Of one layer; `range` is what `fitted` finds."""

    method = "quantized_adder"
    fits = True
    recipe = RECIPE

    bits: int = Field(8, ge=2, le=8, description="of a weight and of what is read")
    groups: int = Field(4, ge=1, le=MOST_GROUPS, description="of filters with a scale each, at most")
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
        if not all(call.param_shapes.get("weight", (1,))):
            return "has no filters: leave it out of the plan"
        if call.geometry is not None and call.geometry.groups > 1:
            return "has groups of channels, whose scales would be apart: leave it an adder layer in float"
        return super().refuse(call)

    def unpacked(self) -> str | None:
        if self.range is not None:
            return None
        return ("takes the range of every batch anew: fit it to pictures, `edgetune.compress.quantize_layers(model, "
                "QuantizedAdder(), batches)`")

    def fitted(self, x: torch.Tensor) -> QuantizedAdder:
        return self.model_copy(update={"range": max(reach_of(x), self.range or 0.0)})

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                 progress: torch.Tensor) -> torch.Tensor:
        if x.is_meta:  # scales are numbers, which a shape has not
            return adder(x, weight, geometry)
        with torch.no_grad():
            steps = self.steps(weight, self.range or reach_of(x))
            found = answer(x, arranged(steps), geometry, self.bits, self.exact).to(x.dtype)
        if not torch.is_grad_enabled():
            return found
        y = adder(x, weight, geometry)
        return y + (found - y).detach()

    def steps(self, weight: torch.Tensor, reach: float) -> Steps:
        """weight (o i u v) in whole steps, for inputs from 0 to `reach`."""
        return redistribute(weight, self.bits, self.groups, reach)
