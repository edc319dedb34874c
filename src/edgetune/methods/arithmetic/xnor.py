"""XNOR-Net and binary-weight networks: one bit a weight with a scale a filter, and one bit a value that is read.

What it does
    A filter becomes its signs times the mean of its absolute weights, the scale that comes closest to it. What the
    layer reads becomes its signs as well, unless `activations` is off (a binary-weight network). A sum of products is
    then a count of equal bits. Activations in front of such layers become clips to -1 and 1 and pools move in front
    of their norms, so that the order is norm, sign, convolution, pool: a norm centres values where signs are taken,
    and of +-1 a largest would nearly always be +1.

Shapes
    x (n c h w), weight (o i u v), y (n o p q); scale (o)

What is kept (bytes)
    n c h w / 8 for the signs of the input; nothing for the surrogate's slope behind a clip, elsewhere n c h w / 8
    more. A norm behind the layer keeps two numbers a channel: what it reads is made again. Packed: one bit a weight.

What changes in the gradient or the answer
    y = alpha_o sum sign(x) sign(w), alpha_o = mean |w_o|. The gradient of alpha(W) sign(W) is the whole chain rule,
    alpha's part included: gW = sign(W)/n sum(g~ sign(W)) + alpha g~ 1[|W| < 1]. Of sign(x) it is g 1[|x| < 1].
    With `input_scale` y is also multiplied by K, the mean of |x| over the window and all channels.

When not to use
    In the first and the last layer, in depthwise layers, and in small networks that have no accuracy to spare. With
    `input_scale` the layer's answer is needed twice, and nothing is kept as bits.

Reference
    Rastegari, Ordonez, Redmon and Farhadi, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
    Networks", ECCV 2016, sections 3.1 and 3.2. The published gradient of the weights, alpha 1[|W| <= 1] + 1/n, leaves
    out that alpha depends on all weights of a filter; here it is exact. Zero padding, a third value among signs, is an
    option (`pad_value`), as is K, which neither released code has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field

from edgetune.hosts.binary import BinaryMethod, clipped_slope, signs_of, with_slope
from edgetune.overlap import ConvGeometry


def scaled_signs(weight: torch.Tensor) -> torch.Tensor:
    """alpha sign(W): weight (o i u v) as signs times the mean of its absolute values, a filter each."""
    return weight.abs().mean((1, 2, 3), keepdim=True) * with_slope(signs_of(weight), weight, clipped_slope(weight))


def window_means(x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """K (n 1 p q): the mean of |x| (n c h w) over channels and each window; beyond the borders there is nothing."""
    top, bottom, left, right = geometry.pads
    means = F.pad(x.abs().mean(1, keepdim=True), (left, right, top, bottom))
    box = means.new_full((1, 1, *geometry.kernel), 1 / (geometry.kernel[0] * geometry.kernel[1]))
    return F.conv2d(means, box, None, geometry.stride, 0, geometry.dilation)


class XNOR(BinaryMethod):
    """Of one layer."""

    method = "xnor"
    recipe: ClassVar[Mapping[str, Any]] = {"optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 1e-4}

    input_scale: bool = Field(False, description="whether answers are scaled by the mean of |x| under each window")

    @property
    def keeps_bits(self) -> bool:
        return super().keeps_bits and not self.input_scale

    def quantize_weight(self, weight: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        return scaled_signs(weight)

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                 progress: torch.Tensor) -> torch.Tensor:
        y = super().convolve(x, weight, geometry, progress)
        return y * window_means(x, geometry) if self.input_scale and self.activations else y
