"""The convolution host: the layer's own products, and a layer method's pure functions as a one-layer segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from edgetune.contract import Kept, LayerMethod, Needs, Rule, Segment, Tensors
from edgetune.graph import Call
from edgetune.kernels import is_channels_last
from edgetune.overlap import ConvGeometry

# the overload itself: to look it up costs as much as a small layer
_convolution_backward = torch.ops.aten.convolution_backward.default


def padded(x: torch.Tensor, geometry: ConvGeometry, value: float = 0.0) -> tuple[torch.Tensor, ConvGeometry]:
    """x (n c h w) with `value` around it as the layer pads, and the layer that pads no more."""
    top, bottom, left, right = geometry.pads
    if not any(geometry.pads):
        return x, geometry
    height, width = geometry.in_hw
    unpadded = geometry.model_copy(update={"in_hw": (height + top + bottom, width + left + right),
                                           "pads": (0, 0, 0, 0), "same": False})
    return F.pad(x, (left, right, top, bottom), value=value), unpadded


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
             geometry: ConvGeometry) -> torch.Tensor:
    """The layer's own forward, bit for bit: x (n c h w), weight (o i u v) -> y (n o h w)."""
    if not geometry.symmetric:
        x, geometry = padded(x, geometry)
    top, _, left, _ = geometry.pads
    return F.conv2d(x, weight, bias, geometry.stride, (top, left), geometry.dilation, geometry.groups)


def input_gradient(g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """The exact gx (n c h w) of the layer from g (n o p q) and weight (o i u v)."""
    n, (top, bottom, left, right) = g.shape[0], geometry.pads
    height, width = geometry.in_hw
    if geometry.symmetric:
        x = _not_read((n, geometry.in_channels, height, width), g)
        return _backward(g, x, weight.to(g.dtype), geometry, (top, left), (True, False))[0]
    larger = _not_read((n, geometry.in_channels, height + top + bottom, width + left + right), g)
    gx, _ = _backward(g, larger, weight.to(g.dtype), geometry, (0, 0), (True, False))
    return gx[:, :, top:top + height, left:left + width]


def weight_gradient(x: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """The exact gw (o i u v) of the layer from x (n c h w) and g (n o p q)."""
    if not geometry.symmetric:
        x, geometry = padded(x, geometry)
    top, _, left, _ = geometry.pads
    if _few_pointwise(geometry):
        x, g = x.contiguous(), g.contiguous()
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
    x = x.to(g.dtype)
    return _backward(g, x, _not_read(shape, x), geometry, (top, left), (False, True))[1]


def both_gradients(x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor,
                   geometry: ConvGeometry) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact gx and gw at once: torch puts g into its own order only once, and follows the memory order of x."""
    top, _, left, _ = geometry.pads
    if geometry.symmetric and not _few_pointwise(geometry):
        return _backward(g, x.to(g.dtype), weight.to(g.dtype), geometry, (top, left), (True, True))
    return input_gradient(g, weight, geometry), weight_gradient(x, g, geometry)


def _not_read(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A stand-in of that shape for a tensor that torch asks for and does not read, in the memory order of `like`.

    It lies on `like`, where that is large enough, and is never written. A stand-in in another order, and one number
    expanded is in none, would be copied, and the products would be made in that order, which costs more than they do.
    """
    n, c, h, w = shape
    last = is_channels_last(like)
    strides = (h * w * c, 1, w * c, c) if last else (c * h * w, h * w, w, 1)
    if like.numel() < n * c * h * w or not (last or like.is_contiguous()):
        return like.new_empty_strided(shape, strides)
    return like.as_strided(shape, strides)


def _few_pointwise(geometry: ConvGeometry) -> bool:
    """Where oneDNN, without AVX-512, makes wrong weight gradients channels last, and writes beyond its buffers."""
    return geometry.kernel == (1, 1) and geometry.stride != (1, 1) and geometry.in_channels < 8


def _backward(g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
              padding: tuple[int, int], wanted: tuple[bool, bool]) -> tuple[torch.Tensor, torch.Tensor]:
    # torch computes only what the mask asks for: the tensor that is not read may be a stand-in
    gx, gw, _ = _convolution_backward(g, x, weight, None, geometry.stride, padding, geometry.dilation,
                                      False, (0, 0), geometry.groups, (*wanted, False))
    return gx, gw


def geometry_at(call: Call, x: torch.Tensor) -> ConvGeometry:
    """The call's geometry on the map that is really there."""
    assert call.geometry is not None
    return call.geometry.at(int(x.shape[2]), int(x.shape[3]))


def state_of(call: Call, params: Tensors) -> dict[str, torch.Tensor]:
    """What a layer's methods remember of it, by role."""
    return {role: params[name] for role, name in call.state.items()}


_PART = "x:"


def _named(kept: Kept) -> dict[str, torch.Tensor]:
    """What a method keeps of x, under names of its own."""
    return {"x": kept} if isinstance(kept, torch.Tensor) else {_PART + name: part for name, part in kept.items()}


def _given(kept: Tensors) -> Kept:
    """The inverse of `_named`."""
    if "x" in kept:
        return kept["x"]
    return {name.removeprefix(_PART): part for name, part in kept.items() if name.startswith(_PART)}


@dataclass(frozen=True)
class ConvRule:
    """Forward as the layer's own; backward by the method. The bias gradient is exact."""

    method: LayerMethod

    def learner(self, call: Call) -> str:
        """The parameter whose gradient the method computes: the weight, or what learns in its place."""
        return call.params.get(self.method.learns_as.get("weight", "weight"), "")

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors,
                needs: Needs) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        call, x = segment.calls[0], xs[0]
        geometry = geometry_at(call, x)
        weight, bias = params[call.params["weight"]], params.get(call.params.get("bias", ""))
        y = convolve(x, weight, bias, geometry)
        # under autocast the layer sees x in y's precision, and that is what is worth keeping
        kept = {"size": x.new_empty((*x.shape[2:], 0))}
        if self.learner(call) in needs.params:
            kept |= _named(self.method.keep(x.to(y.dtype), geometry, state_of(call, params)))
        return (y,), kept

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        call, gy = segment.calls[0], gys[0]
        assert call.geometry is not None
        if gy is None:
            return (None,), {}
        geometry = call.geometry.at(int(kept["size"].shape[0]), int(kept["size"].shape[1]))
        name, bias = self.learner(call), call.params.get("bias", "")
        weight = params[call.params["weight"]]
        grads: dict[str, torch.Tensor] = {}
        if bias in needs.params:
            grads[bias] = gy.sum((0, 2, 3), dtype=weight.dtype)
        if not needs.inputs[0] and name not in needs.params:
            return (None,), grads
        g = self.method.receive(gy, geometry)
        gx, gw = self.method.gradients(_given(kept) if name in needs.params else None, g, weight, geometry,
                                       needs.inputs[0])
        if gw is not None:
            grads[name] = gw.to(weight.dtype)
        return (gx,), grads


def conv_rule(method: LayerMethod, call: Call) -> Rule:
    """What a convolution does by a method."""
    return method.rule(call) or ConvRule(method)
