"""AdderNet: a convolution by additions alone, minus the sum of absolute differences of its input and each filter.

What it does
    A filter answers how near the window comes to it: y is minus their l1 distance, which takes two additions where a
    convolution takes a multiplication and an addition. A norm must follow, as y is large and negative: the more weights
    a filter has, the larger. Gradients are not those of the distance, whose slopes are signs: a weight's is the
    difference itself, an input's the difference clipped, and every layer's weight gradient is scaled to one length, as
    it would otherwise shrink from layer to layer.

Shapes
    x (n c h w), weight (o i u v), y (n o p q)

What is kept (bytes)
    4 n c h w for the input, which both gradients read; a norm behind the layer keeps its own input as ever.

What changes in the gradient or the answer
    y = -sum |x - w|; padding is x = 0, so it adds |w|. gw = sum (x - w) gy, scaled to the norm eta sqrt(k) with k the
    number of weights; gx = sum clip(w - x, -1, 1) gy.

When not to use
    Without a norm behind the layer, or where a processor multiplies as fast as it adds and numbers stay float: the
    float kernel is slower than a convolution. Its use is in integers (sums of absolute differences of bytes).

Reference
    Chen et al., "AdderNet: Do We Really Need Multiplications in Deep Learning?", CVPR 2020, equations 2, 7, 9 and 13;
    eta = 0.2 as in the released code, which scales within backward.
"""

from __future__ import annotations

import torch
from pydantic import Field

from edgetune.contract import ArithmeticMethod
from edgetune.hosts.adder import ETA, RECIPE, adder
from edgetune.overlap import ConvGeometry


class AdderNet(ArithmeticMethod):
    """Of one layer."""

    method = "addernet"
    recipe = RECIPE

    eta: float = Field(ETA, gt=0, description="length of a layer's weight gradient, a square root of a weight")

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                 progress: torch.Tensor) -> torch.Tensor:
        return adder(x, weight, geometry, self.eta)

    def unpacked(self) -> str | None:
        return ("subtracts numbers in float: let it compute in few bits, `edgetune.compress.quantize_layers(model, "
                "QuantizedAdder(), batches)`")
