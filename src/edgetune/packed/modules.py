"""What a packed network runs: each layer of its header as a module, from values to the values it makes, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from edgetune import kernels
from edgetune.hosts.adder_integers import Arranged, Steps, answer, arranged
from edgetune.hosts.binary import layer_of
from edgetune.hosts.conv import convolve, padded
from edgetune.kernels.binary_format import BinaryLayer
from edgetune.methods.arithmetic.xnor import window_means
from edgetune.packed import layers
from edgetune.packed.coding import decode, plain, plain_steps
from edgetune.packed.layers import BITS, Window
from edgetune.recognise import MASKS, SMOOTH

Tensors = Mapping[str, torch.Tensor]
Values = dict[str, torch.Tensor]


class _Step(nn.Module):
    """A layer that runs. Subclasses give `forward(*values)` -> the values it makes, by name."""

    def __init__(self, layer: Any, tensors: Tensors) -> None:
        super().__init__()
        self.name, self.bits = layer.name, layer.name + BITS

    def named(self, y: torch.Tensor | None, bits: torch.Tensor | None) -> Values:
        """What of a map and its bits there is, by name."""
        return {name: value for name, value in ((self.name, y), (self.bits, bits)) if value is not None}

    def hold(self, **tensors: torch.Tensor | None) -> None:
        """Tensors that move with the network, which its record keeps."""
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)


class _Conv(_Step):
    """A convolution in float."""

    few: ClassVar[int] = 4
    """Channels up to which torch is faster on maps that are padded before, with the same answer."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    later: torch.Tensor | None

    def __init__(self, layer: layers.Conv, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        # layers of binary weights pad before and add after, as in training
        binary, bias = layer.coding == "bits", tensors.get("bias")
        self.geometry, self.before = layer.geometry, binary or layer.geometry.in_channels <= self.few
        weight = decode(tensors, layer.coding, layers.filter_shape(layer.geometry))
        self.hold(weight=weight.contiguous(memory_format=torch.channels_last), bias=None if binary else bias,
                  later=bias.view(1, -1, 1, 1) if binary and bias is not None else None)

    def forward(self, x: torch.Tensor) -> Values:
        geometry = self.geometry.at(int(x.shape[2]), int(x.shape[3]))
        if self.before:
            x, geometry = padded(x, geometry, 0.0)
        y = convolve(x, self.weight, self.bias, geometry)
        return {self.name: y if self.later is None else y + self.later}


class _Linear(_Step):
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: layers.Linear, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.hold(weight=decode(tensors, layer.coding, (layer.out_features, layer.in_features)),
                  bias=tensors.get("bias"))

    def forward(self, x: torch.Tensor) -> Values:
        return {self.name: F.linear(x, self.weight, self.bias)}


class _Binary(_Step):
    """What the convolutions of bits share: filters, arranged, and the layer as the kernels speak of it."""

    filters: torch.Tensor

    def __init__(self, layer: layers.Binary, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.geometry, self.pad_value = layer.geometry, layer.pad_value
        self.fixed = None if layer.geometry.same else layer_of(layer.geometry, layer.pad_value)
        bits = plain(tensors["weight"], layers.filter_shape(layer.geometry))
        self.hold(filters=kernels.arrange_filters(bits, layer.geometry.in_channels, layer.geometry.groups))

    def at(self, bits: torch.Tensor) -> BinaryLayer:
        """The layer on a map of bits."""
        return self.fixed or layer_of(self.geometry.at(int(bits.shape[1]), int(bits.shape[2])), self.pad_value)


class _BinaryMap(_Binary):
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: layers.BinaryMap, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.hold(scale=tensors["scale"], bias=tensors.get("bias"))

    def forward(self, bits: torch.Tensor, x: torch.Tensor | None = None) -> Values:
        y = kernels.binary_conv(bits, self.filters, self.at(bits), self.scale)
        if x is not None:
            y = y * window_means(x, self.geometry.at(int(x.shape[2]), int(x.shape[3])))
        return {self.name: y if self.bias is None else y + self.bias.view(1, -1, 1, 1)}


class BinaryClip(_Binary):
    """A convolution of bits with the pointwise step behind it."""

    scale: torch.Tensor
    gain: torch.Tensor | None
    shift: torch.Tensor | None

    def __init__(self, conv: layers.BinaryMap, tensors: Tensors, step: layers.Pointwise, more: Tensors) -> None:
        super().__init__(conv, tensors)
        self.name, self.bits = step.name, step.name + BITS
        self.given = *bounds_of(step), step.map, step.bits
        self.hold(scale=tensors["scale"], gain=more.get("gain"), shift=more.get("shift"))

    def forward(self, bits: torch.Tensor, residual: torch.Tensor | None = None) -> Values:
        made = kernels.binary_conv_clip(bits, self.filters, self.at(bits), self.scale, self.gain, self.shift, residual,
                                        *self.given)
        return self.named(*made)


class _BinarySign(_Binary):
    threshold: torch.Tensor
    flip: torch.Tensor | None

    def __init__(self, layer: layers.BinarySign, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.hold(threshold=tensors["threshold"], flip=tensors["flip"] if bool(tensors["flip"].any()) else None)

    def forward(self, bits: torch.Tensor) -> Values:
        return {self.bits: kernels.binary_conv_sign(bits, self.filters, self.at(bits), self.threshold, self.flip)}


class _Adder(_Step):
    filters: torch.Tensor
    members: torch.Tensor
    step: torch.Tensor
    shift: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: layers.Adder, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.layer, bias = layer, tensors.get("bias")
        weight = plain_steps(tensors["weight"], layer.bits, layers.filter_shape(layer.geometry))
        made = arranged(Steps(weight, tensors["group"].long(), tensors["step"], tensors["shift"]))
        self.sizes = made.sizes
        self.hold(filters=made.filters, members=made.members, step=made.step, shift=made.shift,
                  bias=None if bias is None else bias.view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> Values:
        made = Arranged(self.filters, self.members, self.step, self.shift, self.sizes)
        geometry = self.layer.geometry.at(int(x.shape[2]), int(x.shape[3]))
        y = answer(x, made, geometry, self.layer.bits, self.layer.exact)
        return {self.name: y if self.bias is None else y + self.bias}


class _Pointwise(_Step):
    gain: torch.Tensor | None
    shift: torch.Tensor | None

    def __init__(self, layer: layers.Pointwise, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.given = *bounds_of(layer), layer.map, layer.bits
        self.hold(gain=tensors.get("gain"), shift=tensors.get("shift"))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Values:
        flat = x.dim() == 2  # between linear layers
        if flat:
            x, residual = x[..., None, None], None if residual is None else residual[..., None, None]
        y, bits = kernels.affine_clip(x, self.gain, self.shift, residual, *self.given)
        return self.named(y.flatten(1) if flat and y is not None else y, bits)


def bounds_of(layer: layers.Pointwise) -> tuple[float, float]:
    """Between which numbers a step keeps its values."""
    return (-math.inf, math.inf) if layer.activation is None else MASKS[layer.activation]


class _Smooth(_Step):
    def __init__(self, layer: layers.Smooth, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.function = SMOOTH[layer.function]

    def forward(self, x: torch.Tensor) -> Values:
        return {self.name: self.function(x)}


class _MaxPool(_Step):
    def __init__(self, layer: layers.MaxPool, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.window = layer.window

    def forward(self, x: torch.Tensor) -> Values:
        w = self.window
        return {self.name: F.max_pool2d(x, w.kernel, w.stride, w.pad, w.dilation, w.ceil_mode)}


class _BitPool(_Step):
    flip: torch.Tensor | None

    def __init__(self, layer: layers.BitPool, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.window = layer.window
        signs = torch.where(tensors["flip"], 1.0, -1.0).view(1, -1, 1, 1) if layer.flipped else None
        self.hold(flip=None if signs is None else kernels.sign_pack(signs))

    def forward(self, bits: torch.Tensor) -> Values:
        made = any_under(bits, self.window)
        return {self.bits: made if self.flip is None else made ^ self.flip}


def any_under(bits: torch.Tensor, window: Window) -> torch.Tensor:
    """Or of the words under each window: int64 (n h w words) -> (n p q words)."""
    h, w = bits.shape[1:3]
    # torch says which sizes a pool makes, whatever its rounding
    p, q = F.max_pool2d(bits.new_empty((1, 1, h, w), device="meta", dtype=torch.float32), window.kernel, window.stride,
                        window.pad, window.dilation, window.ceil_mode).shape[2:]
    (top, left), (down, across), (below, beside) = window.pad, window.stride, window.dilation
    ku, kv = window.kernel
    bottom, right = ((count - 1) * stride + (taps - 1) * apart + 1 - before - size for count, stride, taps, apart,
                     before, size in ((p, down, ku, below, top, h), (q, across, kv, beside, left, w)))
    wide = F.pad(bits, (0, 0, left, max(right, 0), top, max(bottom, 0)))
    rows = _any_of(wide, 1, p, down, ku, below)
    return _any_of(rows, 2, q, across, kv, beside)


def _any_of(bits: torch.Tensor, axis: int, count: int, stride: int, taps: int, apart: int) -> torch.Tensor:
    """Or of `taps` words, `apart` from each other, along an axis."""
    made: torch.Tensor | None = None
    for tap in range(taps):
        index = [slice(None)] * 4
        index[axis] = slice(tap * apart, tap * apart + (count - 1) * stride + 1, stride)
        made = bits[tuple(index)] if made is None else made | bits[tuple(index)]
    assert made is not None
    return made


class _Mean(_Step):
    def __init__(self, layer: layers.Mean, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.keepdim = layer.keepdim

    def forward(self, x: torch.Tensor) -> Values:
        return {self.name: x.mean((2, 3), keepdim=self.keepdim)}


class _Flatten(_Step):
    def forward(self, x: torch.Tensor) -> Values:
        return {self.name: x.flatten(1)}


class _Subsample(_Step):
    def __init__(self, layer: layers.Subsample, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.stride = layer.stride

    def forward(self, x: torch.Tensor) -> Values:
        return {self.name: x[:, :, ::self.stride[0], ::self.stride[1]]}


class _Pad(_Step):
    def __init__(self, layer: layers.Pad, tensors: Tensors) -> None:
        super().__init__(layer, tensors)
        self.pads = (0, 0, 0, 0, layer.before, layer.after)

    def forward(self, x: torch.Tensor) -> Values:
        return {self.name: F.pad(x, self.pads)}


class _Scale(_Step):
    def forward(self, x: torch.Tensor, factor: torch.Tensor) -> Values:
        return {self.name: x * factor}


MODULES: dict[type[layers.Layer], Any] = {
    layers.Conv: _Conv, layers.Linear: _Linear, layers.BinaryMap: _BinaryMap, layers.BinarySign: _BinarySign,
    layers.Adder: _Adder, layers.Pointwise: _Pointwise, layers.Smooth: _Smooth, layers.MaxPool: _MaxPool,
    layers.BitPool: _BitPool, layers.Mean: _Mean, layers.Flatten: _Flatten, layers.Subsample: _Subsample,
    layers.Pad: _Pad, layers.Scale: _Scale}
