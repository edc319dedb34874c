"""Forward and backward of the integer steps, for the segment host. Maps are float tensors that hold integers.

Rounding counts as the identity, the clamp as a gate: with m = 1 where low <= result before the clamp <= high,

    conv   g = gy * m * s        gb = sum g      gw = correlation(x - zero, g)      gx = transposed(w, g)
    add    g = gy * m            gx1 = g * s1 / s_y,  gx2 = g * s2 / s_y
    mean   g = gy * m            gx = g * s_x / (s_y * pixels)

with s = s_x * s_w / s_y by output channel. All gradients are those of the integers. Kept: m, one bit an output, where
a gradient passes; x, one byte a value, only where the weight learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgetune import kernels
from edgetune.contract import Needs, Segment, Tensors
from edgetune.hosts.pointwise import Backward, Forward, per_channel
from edgetune.methods.backward.exact import Exact
from edgetune.quantize import integer
from edgetune.quantize.record import BIAS_LIMIT, WEIGHT_LIMIT, Add, Clamped, Conv, Mean, Quantization


def clamp(before: torch.Tensor, layer: Clamped, like: torch.Tensor) -> torch.Tensor:
    """The int8 result, in the type of `like`."""
    return before.clamp(layer.low, layer.high).to(like.dtype)


def inside(before: torch.Tensor, layer: Clamped) -> torch.Tensor:
    """The packed mask of what the clamp lets through, both bounds included."""
    return kernels.mask_pack(before.float().contiguous(), layer.low - 0.5, layer.high + 0.5)


def through(gy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """gy where the clamp let through, 0 elsewhere."""
    return kernels.mask_apply(gy.contiguous(), mask)


def whole(params: Tensors, role: str, limit: int) -> torch.Tensor:
    """The integers of a weight or bias: the stored ones, or a float one rounded (see `weights`)."""
    tensor = params.get(f"{role}.integers", params[role])
    return tensor.round().clamp(-limit, limit) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class ConvRule:
    """An integer convolution; parameters `weight`, `bias`, and by output channel `weight_scale`, `multiplier`, `shift`.

    `small` is what `integer.fits_float32` says of integers that never change; None where it has to be asked.
    """

    layer: Conv
    source: Quantization
    small: bool | None = None

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        x, by = xs[0], (per_channel(params["multiplier"]).long(), per_channel(params["shift"]).long())
        weight, bias = whole(params, "weight", WEIGHT_LIMIT), whole(params, "bias", BIAS_LIMIT)
        before = integer.conv(x, weight, bias, self.source.zero_point, self.layer.geometry, by, self.small)
        before += self.layer.out.zero_point
        kept = {}
        if needs.inputs[0] or needs.params:
            kept["mask"] = inside(before, self.layer)
        if "weight" in needs.params:
            kept["x"] = x.to(torch.int8)
        return (clamp(before, self.layer, x),), kept

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        gy = gys[0]
        if gy is None:
            return (None,), {}
        scale = self.source.scale * params["weight_scale"] / self.layer.out.scale
        g = through(gy, kept["mask"]) * per_channel(scale.to(gy.dtype))
        grads: dict[str, torch.Tensor] = {}
        if "bias" in needs.params:
            grads["bias"] = g.sum((0, 2, 3)).to(params["bias"].dtype)
        if "weight" in needs.params:
            centred = kept["x"].to(g.dtype) - self.source.zero_point
            gw = Exact().grad_weight(centred, g, self.layer.geometry)
            grads["weight"] = gw.to(params["weight"].dtype)
        if not needs.inputs[0]:
            return (None,), grads
        return (Exact().grad_input(g, whole(params, "weight", WEIGHT_LIMIT), self.layer.geometry),), grads


@dataclass(frozen=True)
class AddRule:
    """A residual add; no parameters."""

    layer: Add
    sources: tuple[Quantization, Quantization]

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        before = integer.add(xs[0], xs[1], *self.sources, self.layer.out) + self.layer.out.zero_point
        return (clamp(before, self.layer, xs[0]),), {"mask": inside(before, self.layer)} if any(needs.inputs) else {}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None:
            return (None, None), {}
        g = through(gys[0], kept["mask"])
        gains = (how.scale / self.layer.out.scale for how in self.sources)
        return tuple(g * gain if wanted else None for gain, wanted in zip(gains, needs.inputs, strict=True)), {}


@dataclass(frozen=True)
class MeanRule:
    """The mean over the map; no parameters."""

    layer: Mean
    source: Quantization

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        before = integer.mean(xs[0], self.source, self.layer.out) + self.layer.out.zero_point
        kept = {"size": xs[0].new_empty((*xs[0].shape[2:], 0))}
        if needs.inputs[0]:
            kept["mask"] = inside(before, self.layer)
        return (clamp(before, self.layer, xs[0]),), kept

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None or not needs.inputs[0]:
            return (None,), {}
        height, width = kept["size"].shape[:2]
        gain = integer.mean_scale(self.source, self.layer.out, height * width)
        return ((through(gys[0], kept["mask"]) * gain).expand(-1, -1, height, width),), {}
