"""Exact hosts for what stands between convolutions: they keep only what their own gradient reads.

Stock torch keeps the input of a frozen norm and of every activation; here a frozen norm keeps nothing unless its
scale learns, a ReLU keeps one bit a value, and max-pooling one byte an output instead of eight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from edgetune import kernels
from edgetune.contract import Needs, Rule, Segment, Tensors
from edgetune.graph import Call
from edgetune.recognise import MASKS, SMOOTH

Forward = tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]
Backward = tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]


def normalise(call: Call, x: torch.Tensor, params: Tensors) -> torch.Tensor:
    """Batch normalisation by running statistics, as the layer's own forward."""
    mean, var = params[call.params["running_mean"]], params[call.params["running_var"]]
    weight, bias = params.get(call.params.get("weight", "")), params.get(call.params.get("bias", ""))
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps(call))


def eps(call: Call) -> float:
    """The norm's epsilon."""
    return float(call.attributes["eps"] or 0.0)


def inverse_deviation(call: Call, params: Tensors) -> torch.Tensor:
    """1 / sqrt(running variance + eps), (c)."""
    return (params[call.params["running_var"]] + eps(call)).rsqrt()


def norm_scale(call: Call, params: Tensors) -> torch.Tensor:
    """What a frozen norm multiplies each channel by, (c)."""
    scale = inverse_deviation(call, params)
    return scale * params[call.params["weight"]] if "weight" in call.params else scale


def scale_gradient(call: Call, g: torch.Tensor, x: torch.Tensor, params: Tensors) -> torch.Tensor:
    """(c): the gradient of a frozen norm's scale, from that of its output, g, and its input x, both (n c h w)."""
    centred = x - per_channel(params[call.params["running_mean"]])
    return (g * centred).sum((0, 2, 3), dtype=params[call.params["weight"]].dtype) * inverse_deviation(call, params)


def per_channel(values: torch.Tensor) -> torch.Tensor:
    """(c) -> (1 c 1 1)."""
    return values.view(1, -1, 1, 1)


def slope(function: str, x: torch.Tensor) -> torch.Tensor:
    """The derivative of a smooth activation at x, by differentiating the function itself."""
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        return torch.autograd.grad(SMOOTH[function](at).sum(), at)[0]


class NormRule:
    """A norm with frozen statistics: exact, and keeps its input only when the scale learns."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        call, x = segment.calls[0], xs[0]
        learns_scale = call.params.get("weight", "") in needs.params
        return (normalise(call, x, params),), {"x": x} if learns_scale else {}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        call, gy = segment.calls[0], gys[0]
        if gy is None:
            return (None,), {}
        weight, bias = call.params.get("weight", ""), call.params.get("bias", "")
        if weight in needs.params:  # torch makes all three in one pass over the maps
            wanted = (needs.inputs[0], True, bias in needs.params)
            gx, gw, gb = torch.ops.aten.native_batch_norm_backward(
                gy, kept["x"], params[weight], params[call.params["running_mean"]], params[call.params["running_var"]],
                None, None, False, eps(call), wanted)
            return (gx if wanted[0] else None,), {weight: gw} | ({bias: gb} if wanted[2] else {})
        grads: dict[str, torch.Tensor] = {}
        if bias in needs.params:
            grads[bias] = gy.sum((0, 2, 3), dtype=params[bias].dtype)
        gx = gy * per_channel(norm_scale(call, params)).to(gy.dtype) if needs.inputs[0] else None
        return (gx,), grads


class MaskRule:
    """ReLU, ReLU6 and the clip to -1 and 1: one bit a value, packed eight to a byte."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        call, x = segment.calls[0], xs[0]
        y = activate(call.function, x)
        if not needs.inputs[0]:
            return (y,), {}
        # bits follow the memory order of what was packed; the name says which
        order = "channels_last" if kernels.is_channels_last(y) else "contiguous"
        return (y,), {order: kernels.mask_pack(y, *MASKS[call.function])}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None or not needs.inputs[0]:
            return (None,), {}
        ((order, bits),) = kept.items()
        layout = torch.channels_last if order == "channels_last" else torch.contiguous_format
        return (kernels.mask_apply(gys[0].contiguous(memory_format=layout), bits),), {}


class SmoothRule:
    """Smooth activations: exact, their input kept."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        call, x = segment.calls[0], xs[0]
        return (activate(call.function, x),), {"x": x} if needs.inputs[0] else {}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None or not needs.inputs[0]:
            return (None,), {}
        return (gys[0] * slope(segment.calls[0].function, kept["x"]),), {}


@dataclass(frozen=True)
class MaxPoolRule:
    """Max-pooling that keeps one byte an output (the place inside its window) instead of an int64 index."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        x = xs[0]
        y, index = kernels.max_pool(x, *_window(segment.calls[0]))
        if not needs.inputs[0]:
            return (y,), {}
        return (y,), {"index": index, "size": x.new_empty((*x.shape[2:], 0))}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None or not needs.inputs[0]:
            return (None,), {}
        height, width = int(kept["size"].shape[0]), int(kept["size"].shape[1])
        return (kernels.max_pool_backward(gys[0], kept["index"], height, width, *_window(segment.calls[0])[:-1]),), {}


def _window(call: Call) -> tuple[int, int, int, int, int, int, int, int, bool]:
    a = call.attributes
    kh, kw, sh, sw, ph, pw, dh, dw = (int(a[f"{name}_{axis}"] or 0)
                                      for name in ("kernel", "stride", "pad", "dilation") for axis in "hw")
    return kh, kw, sh, sw, ph, pw, dh, dw, bool(a["ceil_mode"])


_MASKED: dict[str, Callable[..., torch.Tensor]] = {"relu": F.relu, "relu6": F.relu6, "hardtanh": F.hardtanh}


def activate(function: str, x: torch.Tensor, in_place: bool = False) -> torch.Tensor:
    """The activation's own forward; with `in_place` x may be overwritten where the function allows it."""
    if function in _MASKED:
        return _MASKED[function](x, inplace=in_place)
    return SMOOTH[function](x)


def exact_rule(call: Call) -> Rule | None:
    """The host of a call that is neither convolution nor free of cost, or None where stock torch keeps as little."""
    if call.kind == "activation":
        return MaskRule() if call.function in MASKS else SmoothRule() if call.function in SMOOTH else None
    table: dict[str, Rule] = {"norm": NormRule(), "max_pool": MaxPoolRule()}
    return table.get(call.kind)
