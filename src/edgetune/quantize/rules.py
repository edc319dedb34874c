"""Forward and backward of the integer steps, for the segment host.

A map goes from step to step as two tensors: a `handle` of its shape without numbers, to which autograd gives the
gradient, as it does to floats only; and its int8 numbers. A step's inputs are its handles, then its integers.
Rounding counts as the identity, the clamp as a gate: with m = 1 where low <= result before the clamp <= high,

    conv   g = gy * m * s        gb = sum g      gw = correlation(x - zero, g)      gx = transposed(w, g)
    add    g = gy * m            gx1 = g * s1 / s_y,  gx2 = g * s2 / s_y
    mean   g = gy * m            gx = g * s_x / (s_y * pixels)

with s = s_x * s_w / s_y by output channel. All gradients are those of the integers. Kept: m, one bit an output, where
a gradient passes; x, one byte a value, only of the channels that a learning weight reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from edgetune import kernels
from edgetune.contract import LayerMethod, Needs, Segment, Tensors
from edgetune.hosts.pointwise import Backward, Forward, per_channel
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.quantize import integer
from edgetune.quantize.record import BIAS_LIMIT, WEIGHT_LIMIT, Add, Clamped, Conv, Mean, Pad, Quantization, Subsample

BITS = 2**15
"""Outputs whose bits are packed at a time, a multiple of 8."""


def handle(shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """What autograd sees of a map (n c h w): one number, expanded, in the type that gradients are to have."""
    return like.new_zeros(()).expand(*shape)


def finished(parts: integer.Parts, layer: Clamped, like: torch.Tensor, passes: bool) -> Forward:
    """The map of `layer` from its parts before zero point and clamp; where a gradient `passes`, the mask is kept."""
    shape = (len(like), *layer.shape)
    y = torch.empty(shape, dtype=torch.int8, device=like.device)
    inside = torch.empty(shape, dtype=torch.bool, device=like.device) if passes else None
    for where, before in parts:
        before += layer.out.zero_point
        if inside is not None:
            inside[where] = (before >= layer.low) & (before <= layer.high)
        y[where] = before.clamp_(layer.low, layer.high)
    return (handle(shape, like), y), {} if inside is None else {"mask": packed(inside)}


def packed(inside: torch.Tensor) -> torch.Tensor:
    """The bits of a boolean map, eight to a byte, as `kernels.mask_pack` packs them."""
    return torch.cat([kernels.mask_pack(part.float(), 0.5, 1.5) for part in inside.flatten().split(BITS)])


def through(gy: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """gy where the clamp let through, 0 elsewhere; a tensor of its own."""
    return kernels.mask_apply(gy.contiguous(), mask)


def whole(params: Tensors, role: str, limit: int) -> torch.Tensor:
    """The integers of a weight or bias: the stored ones, or a float one rounded (see `weights`)."""
    tensor = params.get(f"{role}.integers", params[role])
    return tensor.round().clamp(-limit, limit) if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class ConvRule:
    """An integer convolution; parameters `weight`, `bias`, and by output channel `weight_scale`, `multiplier`, `shift`.

    With a window in place of Exact as `method`, `weight` is the part that learns, and `weight.frozen` all of it.
    `small` is what `integer.fits_float32` says of integers that never change; None where it has to be asked.
    """

    layer: Conv
    source: Quantization
    method: LayerMethod = field(default_factory=Exact)
    small: bool | None = None

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        like, x = xs
        by = per_channel(params["multiplier"]).long(), per_channel(params["shift"]).long()
        bias, geometry = whole(params, "bias", BIAS_LIMIT), self.layer.geometry
        parts = integer.conv(x, self._weight(params), bias, self.source.zero_point, geometry, by, self.small)
        ys, kept = finished(parts, self.layer, like, passes=needs.inputs[0] or bool(needs.params))
        return ys, kept | ({"x": self.method.save(x, geometry)} if "weight" in needs.params else {})

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        gy, geometry = gys[0], self.layer.geometry
        if gy is None:
            return (None, None), {}
        scale = self.source.scale * params["weight_scale"] / self.layer.out.scale
        g = through(gy, kept["mask"]).mul_(per_channel(scale.to(gy.dtype)))
        del gy
        grads: dict[str, torch.Tensor] = {}
        if "bias" in needs.params:
            grads["bias"] = g.sum((0, 2, 3)).to(params["bias"].dtype)
        if "weight" in needs.params:
            centred = kept["x"].to(g.dtype).sub_(self.source.zero_point)
            grads["weight"] = self.method.grad_weight(centred, g, geometry).to(params["weight"].dtype)
            del centred
        if not needs.inputs[0]:
            return (None, None), grads
        return (Exact().grad_input(g, self._weight(params), geometry), None), grads

    def _weight(self, params: Tensors) -> torch.Tensor:
        learned = whole(params, "weight", WEIGHT_LIMIT)
        if not isinstance(self.method, SparseUpdate):
            return learned
        weight = params["weight.frozen"].clone()
        self.method.part(weight, self.layer.geometry).copy_(learned)
        return weight


@dataclass(frozen=True)
class AddRule:
    """A residual add; no parameters."""

    layer: Add
    sources: tuple[Quantization, Quantization]

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        parts = integer.add(xs[2], xs[3], *self.sources, self.layer.out)
        return finished(parts, self.layer, xs[0], any(needs.inputs))

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None:
            return (None,) * 4, {}
        g = through(gys[0], kept["mask"])
        first, second = (how.scale / self.layer.out.scale for how in self.sources)
        gx1 = (g * first if needs.inputs[1] else g.mul_(first)) if needs.inputs[0] else None
        return (gx1, g.mul_(second) if needs.inputs[1] else None, None, None), {}


@dataclass(frozen=True)
class MeanRule:
    """The mean over the map; no parameters."""

    layer: Mean
    source: Quantization

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        like, x = xs
        ys, kept = finished(integer.mean(x, self.source, self.layer.out), self.layer, like, needs.inputs[0])
        return ys, kept | {"size": x.new_empty((*x.shape[2:], 0))}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None or not needs.inputs[0]:
            return (None, None), {}
        height, width = kept["size"].shape[:2]
        gain = integer.mean_scale(self.source, self.layer.out, height * width)
        return ((through(gys[0], kept["mask"]) * gain).expand(-1, -1, height, width), None), {}


@dataclass(frozen=True)
class SubsampleRule:
    """Every n-th pixel: the gradient goes back to where the pixels came from."""

    layer: Subsample

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        like, x = xs
        rows, columns = self.layer.stride
        y = x[:, :, ::rows, ::columns].contiguous()  # a view would hold on to the whole map
        return (handle(y.shape, like), y), {"size": x.new_empty((*x.shape[2:], 0))}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None:
            return (None, None), {}
        gx = gys[0].new_zeros((*gys[0].shape[:2], *kept["size"].shape[:2]))
        gx[:, :, ::self.layer.stride[0], ::self.layer.stride[1]] = gys[0]
        return (gx, None), {}


@dataclass(frozen=True)
class PadRule:
    """Channels of zeros: their gradient goes nowhere."""

    layer: Pad

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        like, x = xs
        widths = (0, 0, 0, 0, self.layer.before, self.layer.after)
        y = torch.nn.functional.pad(x, widths, value=self.layer.out.zero_point)
        return (handle(y.shape, like), y), {}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None:
            return (None, None), {}
        return (gys[0][:, self.layer.before:gys[0].shape[1] - self.layer.after], None), {}


@dataclass(frozen=True)
class FloatRule:
    """What integers stand for: y = scale * (x - zero point), in the type of the handle."""

    source: Quantization

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        like, x = xs
        return (integer.dequantize(x.to(like.dtype), self.source),), {}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        return (None if gys[0] is None else gys[0] * self.source.scale, None), {}
