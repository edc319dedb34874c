"""Binary layers: what their methods share, and training that keeps a layer's input as one bit a value.

sign(0) is +1, here and in the kernels. What lies beyond a map's borders is +1, -1 or, at the price of a correction at
every border, 0.

A binary layer's input is two facts: its signs, which the weight's gradient reads, and the surrogate's slope. Both fit
in bits, and a norm behind the layer reads the layer's answer, which is made again from the signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from edgetune import kernels
from edgetune.contract import ArithmeticMethod, Needs, Plan, Segment, Tensors
from edgetune.graph import Call, Graph
from edgetune.hosts.arithmetic import PROGRESS, share
from edgetune.hosts.conv import convolve, geometry_at, input_gradient, padded, weight_gradient
from edgetune.hosts.pointwise import Backward, Forward, eps
from edgetune.kernels.binary_format import BinaryLayer
from edgetune.overlap import ConvGeometry


def signs_of(x: torch.Tensor) -> torch.Tensor:
    """+1 where x is 0 or more, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def with_slope(value: torch.Tensor, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """`value`, whose gradient goes to x times `slope`."""
    return value.detach() + slope.detach() * (x - x.detach())


def clipped_slope(x: torch.Tensor) -> torch.Tensor:
    """The straight-through estimator of sign: 1 strictly between -1 and 1, else 0."""
    return ((x > -1) & (x < 1)).to(x.dtype)


class BinaryMethod(ArithmeticMethod):
    """Weights of one bit and a scale a filter, and unless told otherwise inputs of one bit.

    A method gives `quantize_weight`, which must come out as signs times one scale a filter, and `slope`.
    """

    clips = True

    activations: bool = Field(True, description="whether what a layer reads is binary too")
    pad_value: Literal[-1, 0, 1] = Field(1, description="what lies beyond the borders of a binary map")
    weights_from: float = Field(0.0, ge=0, lt=1, description="share of the training after which weights are binary; "
                                "up to it inputs alone are")

    straight_through: ClassVar[bool] = True
    """Whether `slope` is that of a clip, so that a clip in front says all of it."""

    @property
    def weight_bits(self) -> int:
        return 1

    @property
    def activation_bits(self) -> int:
        return 1 if self.activations else 32

    @property
    def keeps_bits(self) -> bool:
        """Whether training reads no more of a layer's input than signs and slopes."""
        return self.activations

    @property
    def label(self) -> str:
        return super().label + ("" if self.activations else ", binary weights")

    def refuse(self, call: Call) -> str | None:
        if call.kind != "conv":
            return super().refuse(call)
        if call.param_shapes.get("weight", (1,))[0] == 0 or call.geometry is None:
            return "has no filters: leave it out of the plan"
        return None

    def spares(self, call: Call) -> str | None:
        geometry = _geometry(call)
        if geometry.groups > 1:
            return "has groups, so that few signs are summed"
        if geometry.kernel == (1, 1) and geometry.stride != (1, 1):
            return "is a shortcut, all that its block's input goes through"
        return None

    def unpacked(self) -> str | None:
        return None

    def slope(self, x: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        """The surrogate's derivative of sign at x (n c h w)."""
        return clipped_slope(x)

    def keep_slope(self, x: torch.Tensor, progress: torch.Tensor) -> dict[str, torch.Tensor]:
        """What stays of x for `times_slope`: here one bit a value."""
        return {"slope": kernels.mask_pack(x.contiguous(), -1.0, 1.0)}

    def times_slope(self, g: torch.Tensor, kept: Tensors) -> torch.Tensor:
        """g (n c h w) times the slope, from what `keep_slope` gave."""
        return kernels.mask_apply(g.contiguous(), kept["slope"])

    def quantize_activation(self, x: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        return with_slope(signs_of(x), x, self.slope(x, progress)) if self.activations else x

    def weight_at(self, weight: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        """What the layer multiplies by at this point of the training."""
        return weight if share(progress) < self.weights_from else self.quantize_weight(weight, progress)

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                 progress: torch.Tensor) -> torch.Tensor:
        made = self.weight_at(weight, progress)
        if self.activations and not torch.is_grad_enabled() and share(progress) >= self.weights_from:
            return product(kernels.sign_pack(x), made, geometry, self.pad_value)
        read, unpadded = padded(self.quantize_activation(x, progress), geometry, self.pad_value * self.activations)
        return convolve(read, made, None, unpadded)

    @classmethod
    def claim(cls, graph: Graph, plan: Plan) -> list[Segment]:
        """Every layer with binary inputs, with the norm that alone reads it where norms take their batches'
        statistics."""
        return [_segment(graph, plan, call, method) for call in graph.calls
                if call.function == cls.method and isinstance(method := plan.settings(call.name, cls), cls)
                and method.keeps_bits and call.followed and "bias" not in call.params]


def product(bits: torch.Tensor, made: torch.Tensor, geometry: ConvGeometry, pad_value: int) -> torch.Tensor:
    """The layer's answer y (n o p q) from the bits of its input, and signs times a scale a filter, made (o i u v)."""
    filters = kernels.arrange_filters(kernels.sign_pack(made), geometry.in_channels, geometry.groups)
    y = kernels.binary_conv(bits, filters, layer_of(geometry, pad_value), made.abs().amax((1, 2, 3)).float())
    return y.to(made.dtype)


def trimmed(bits: torch.Tensor, channels: int) -> torch.Tensor:
    """The bits of a map, int64 (n h w words), without the bytes of a word that have no channel: uint8 (n h w bytes)."""
    own = -(-channels // 8)
    return bits if own % 8 == 0 else bits.view(torch.uint8)[..., :own].contiguous()


def filled(kept: torch.Tensor) -> torch.Tensor:
    """The inverse of `trimmed`."""
    return kept if kept.dtype == torch.int64 else F.pad(kept, (0, -kept.shape[-1] % 8)).view(torch.int64)


def layer_of(geometry: ConvGeometry, pad_value: int) -> BinaryLayer:
    """The layer as the kernels speak of it."""
    top, bottom, left, right = geometry.pads
    return BinaryLayer(geometry.in_channels, geometry.out_channels, *geometry.kernel, *geometry.stride, top, left,
                       bottom, right, *geometry.dilation, geometry.groups, pad_value)


def _segment(graph: Graph, plan: Plan, call: Call, method: BinaryMethod) -> Segment:
    norm = graph[call.consumers[0]] if len(call.consumers) == 1 else None
    joined = norm is not None and plan.norms == "batch" and _takes_batches(norm)
    clipped = method.straight_through and graph[call.inputs[0]].function == "hardtanh"
    if norm is None or not joined:
        return Segment(rule=BinaryRule(method, clipped), calls=(call,), inputs=call.inputs, outputs=(call.node,),
                       params=tuple(call.params.values()), state=tuple(call.state.values()))
    learn = tuple(norm.params[role] for role in ("weight", "bias") if role in norm.params)
    running = tuple(norm.params[role] for role in ("running_mean", "running_var"))
    return Segment(rule=BinaryRule(method, clipped), calls=(call, norm), inputs=call.inputs, outputs=(norm.node,),
                   params=(*call.params.values(), *learn), state=(*call.state.values(), *running))


def _takes_batches(norm: Call) -> bool:
    return norm.kind == "norm" and norm.followed and norm.attributes.get("momentum") is not None


@dataclass(frozen=True)
class BinaryRule:
    """A binary layer and, where there is one, its norm. Keeps the input's signs, one bit a value, the surrogate's
    slope unless a clip in front has it (`clipped`), and the norm's two numbers a channel."""

    method: BinaryMethod
    clipped: bool

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        conv, x = segment.calls[0], xs[0]
        progress = params[conv.state[PROGRESS]]
        bits = kernels.sign_pack(x)
        kept = {"bits": trimmed(bits, x.shape[1]), "size": x.new_empty((*x.shape, 0))}
        if needs.inputs[0] and not self.clipped:
            kept |= self.method.keep_slope(x, progress)
        made = self.method.weight_at(params[conv.params["weight"]].detach(), progress)
        y = self._answer(bits, geometry_at(conv, x), made, progress)
        if len(segment.calls) == 1:
            return (y,), kept
        norm = segment.calls[1]
        scale, shift = (params.get(norm.params.get(role, "")) for role in ("weight", "bias"))
        running = (params[norm.params[role]] for role in ("running_mean", "running_var"))
        out, mean, inverse = torch.ops.aten.native_batch_norm(
            y, scale, shift, *running, True, float(norm.attributes["momentum"] or 0.0), eps(norm))
        return (out,), kept | {"mean": mean, "inverse": inverse}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        conv, g = segment.calls[0], gys[0]
        if g is None:
            return (None,), {}
        c, h, w = (int(size) for size in kept["size"].shape[1:4])
        geometry, name = _geometry(conv).at(h, w), conv.params["weight"]
        progress, grads = params[conv.state[PROGRESS]], dict[str, torch.Tensor]()
        bits = filled(kept["bits"])
        with torch.enable_grad():
            weight = params[name].detach().requires_grad_()
            made = self.method.weight_at(weight, progress)
        if len(segment.calls) > 1:
            y = self._answer(bits, geometry, made.detach(), progress)
            g, grads = _norm_backward(segment.calls[1], g, y, kept, params, needs)
        if name in needs.params:
            signs = kernels.sign_unpack(bits, c)
            read, unpadded = padded(signs, geometry, self.method.pad_value)
            (grads[name],) = torch.autograd.grad(made, weight, weight_gradient(read, g, unpadded))
        if not needs.inputs[0]:
            return (None,), grads
        gx = input_gradient(g, made.detach(), geometry)
        return (gx if self.clipped else self.method.times_slope(gx, kept),), grads

    def _answer(self, bits: torch.Tensor, geometry: ConvGeometry, made: torch.Tensor,
                progress: torch.Tensor) -> torch.Tensor:
        """The layer's answer from the bits of its input and what it multiplies by."""
        if share(progress) >= self.method.weights_from:
            return product(bits, made, geometry, self.method.pad_value)
        signs = kernels.sign_unpack(bits, geometry.in_channels)
        read, unpadded = padded(signs, geometry, self.method.pad_value)
        return convolve(read, made, None, unpadded)


def _geometry(call: Call) -> ConvGeometry:
    assert call.geometry is not None
    return call.geometry


def _norm_backward(norm: Call, g: torch.Tensor, y: torch.Tensor, kept: Tensors, params: Tensors,
                   needs: Needs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The gradient of the norm's input y, and of its scale and shift."""
    weight, bias = norm.params.get("weight", ""), norm.params.get("bias", "")
    gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
        g, y, params.get(weight), None, None, kept["mean"], kept["inverse"], True,
        eps(norm), (True, weight in needs.params, bias in needs.params))
    grads = {name: grad for name, grad in ((weight, gw), (bias, gb)) if name in needs.params}
    return gx, grads
