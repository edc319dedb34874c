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
from edgetune.hosts.cursor import working_on
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
    """A norm with frozen statistics, and the ReLU behind it where that is the segment's second call: exact.

    Keeps its input only when the scale learns, and of a ReLU what `MaskRule` does.
    """

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        norm, x, masked = segment.calls[0], xs[0], segment.calls[1:]
        y = normalise(norm, x, params)
        kept = {"x": x} if norm.params.get("weight", "") in needs.params else {}
        if masked:
            working_on(masked[0])
            y = activate(masked[0].function, y, in_place=True)
            if needs.inputs[0] or needs.params:
                kept |= mask_of(masked[0], y)
        return (y,), kept

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        norm, g, x = segment.calls[0], gys[0], kept.get("x")
        if g is None:
            return (None,), {}
        bits = None
        if len(segment.calls) > 1:
            g, bits = in_mask_order(segment.calls[1], g, kept)
            working_on(norm)
        weight, bias = norm.params.get("weight", ""), norm.params.get("bias", "")
        gx, gw, gb = kernels.norm_backward(g, bits, x, params.get(weight), params[norm.params["running_mean"]],
                                           params[norm.params["running_var"]], eps(norm), needs.inputs[0])
        grads = {name: own.to(params[name].dtype) for name, own in ((weight, gw), (bias, gb)) if name in needs.params}
        return (gx if needs.inputs[0] else None,), grads


def mask_of(call: Call, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """The bits of what a ReLU gave, under the memory order that they follow, and its name."""
    order = "channels_last" if kernels.is_channels_last(y) else "contiguous"
    return {f"{order}:{call.node}": kernels.mask_pack(y, *MASKS[call.function])}


def in_mask_order(call: Call, g: torch.Tensor, kept: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """g in the memory order of the bits that `mask_of` gave, and these."""
    if (bits := kept.get(f"channels_last:{call.node}")) is not None:
        return g.contiguous(memory_format=torch.channels_last), bits
    return g.contiguous(), kept[f"contiguous:{call.node}"]


class MaskRule:
    """ReLU, ReLU6 and the clip to -1 and 1: one bit a value, packed eight to a byte."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        call, y = segment.calls[0], activate(segment.calls[0].function, xs[0])
        return (y,), mask_of(call, y) if needs.inputs[0] else {}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None or not needs.inputs[0]:
            return (None,), {}
        return (kernels.mask_apply(*in_mask_order(segment.calls[0], gys[0], kept)),), {}


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


def takes_along(call: Call, behind: Call) -> bool:
    """Whether the host of a norm takes the call right behind it as well: a ReLU that alone reads it.

    With nothing in between, no border of a stretch can part them.
    """
    return (call.kind == "norm" and call.followed and call.consumers == (behind.node,)
            and behind.kind == "activation" and behind.function in MASKS)
