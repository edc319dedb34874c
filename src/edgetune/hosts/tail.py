"""A norm and what alone reads it, an add, a ReLU, a max-pool, as one: the norm's input is not kept.

What comes out at the end says what a frozen norm gave wherever a gradient comes back: a ReLU lets gradients pass only
where it let the value pass, an add is undone by its other operand, a max-pool sends gradients where its values came
from. With y = gamma x' + beta, the scale's gradient sum(g x') is (sum(g y) - beta sum(g)) / gamma: of the normalised
input x' nothing is needed. The idea, for a leaky ReLU and batch statistics: Rota Bulo, Porzi and Kontschieder,
"In-Place Activated BatchNorm", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgetune import kernels
from edgetune.contract import Needs, Segment, Tensors
from edgetune.graph import Call
from edgetune.hosts.grid import order
from edgetune.hosts.pointwise import Backward, Forward, MaxPoolRule, activate, norm_scale, normalise, per_channel
from edgetune.recognise import MASKS

THIN = 0.02
"""A scale below this share of the root mean square of its norm's scales is too small to divide by: it stays."""


@dataclass(frozen=True)
class Tail:
    """The calls of a norm's tail: what is there of an add, a ReLU and a max-pool, in this order."""

    norm: Call
    add: Call | None = None
    activation: Call | None = None
    pool: Call | None = None

    @property
    def calls(self) -> tuple[Call, ...]:
        """All of them, in their order."""
        return tuple(call for call in (self.norm, self.add, self.activation, self.pool) if call is not None)


@dataclass(frozen=True)
class TailRule:
    """Keeps "out", what comes out at the end, and "other", what was added, as values that others may keep as well.

    With `bits` the mask of the ReLU is kept apart, one bit a value, as "out" may come back with other zeros.
    """

    tail: Tail
    bits: bool

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        tail, kept = self.tail, dict[str, torch.Tensor]()
        y, learns = normalise(tail.norm, xs[0], params), self._weight in needs.params
        if tail.add is not None:
            y = y.add_(xs[1]) if y.dtype == xs[1].dtype else y + xs[1]
        if tail.activation is not None:
            y = activate(tail.activation.function, y, in_place=True)
        if tail.pool is not None:
            (y,), kept = MaxPoolRule().forward(_alone(tail.pool), (y,), params, Needs((True,), frozenset()))
        if tail.activation is not None and self.bits:
            kept["bits"] = kernels.mask_pack(y, *MASKS[tail.activation.function])
            kept["last"] = y.new_empty((int(kernels.is_channels_last(y)), 0))
        if learns or (tail.activation is not None and not self.bits):
            kept["out"] = y
        if learns and tail.add is not None:
            kept["other"] = xs[1]
        return (y,), kept

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        tail, g = self.tail, gys[0]
        del gys  # maps are large: each goes as soon as it has been read
        if g is None:
            return (None,) * len(segment.inputs), {}
        if tail.activation is not None:
            g = self._masked(g, kept)
        if self._weight in needs.params:
            scaled, grads = self._all_gradients(g, kept, params, needs)
        else:
            scaled = g * per_channel(norm_scale(tail.norm, params)).to(g.dtype) if needs.inputs[0] else None
            grads = self._shift_gradient(g, params, needs)
        if tail.pool is not None and scaled is not None:
            (scaled,), _ = MaxPoolRule().backward(_alone(tail.pool), kept, (scaled,), params,
                                                  Needs((True,), frozenset()))
        return ((scaled,) if tail.add is None else (scaled, g if needs.inputs[1] else None)), grads

    @property
    def _weight(self) -> str:
        return self.tail.norm.params.get("weight", "")

    def _masked(self, g: torch.Tensor, kept: Tensors) -> torch.Tensor:
        """g where the ReLU was open. Behind a max-pool its values tell: they are those that gradients go to."""
        if self.bits:
            return kernels.mask_apply(g.contiguous(memory_format=order(bool(kept["last"].shape[0]))), kept["bits"])
        assert self.tail.activation is not None
        low, high = MASKS[self.tail.activation.function]
        return torch.ops.aten.hardtanh_backward(g, kept["out"], low, high)  # type: ignore[no-any-return]

    def _shift_gradient(self, g: torch.Tensor, params: Tensors, needs: Needs) -> dict[str, torch.Tensor]:
        bias = self.tail.norm.params.get("bias", "")
        if bias not in needs.params:
            return {}
        return {bias: g.sum((0, 2, 3), dtype=torch.promote_types(g.dtype, torch.float32)).to(params[bias].dtype)}

    def _all_gradients(self, g: torch.Tensor, kept: Tensors, params: Tensors,
                       needs: Needs) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """What goes on to the input, and the scale's and the shift's gradients, in one pass over the maps: torch's own
        for a norm of unit variance whose mean is the shift."""
        y = kept["out"] - kept["other"] if self.tail.add is not None else kept["out"]
        bias, gamma = self.tail.norm.params.get("bias", ""), params[self._weight]
        shift, scale = params.get(bias, torch.zeros_like(gamma)), norm_scale(self.tail.norm, params)
        scaled, reached, total = torch.ops.aten.native_batch_norm_backward(
            g, y, scale, shift, torch.ones_like(scale), None, None, False, 0.0,
            (needs.inputs[0], True, bias in needs.params))
        thin = gamma.abs() < THIN * gamma.square().mean().sqrt()
        grads = {self._weight: torch.where(thin, 0, reached / torch.where(thin, 1, gamma)).to(gamma.dtype)}
        if bias in needs.params:
            grads[bias] = total.to(params[bias].dtype)
        return (scaled if needs.inputs[0] else None), grads


def _alone(call: Call) -> Segment:
    return Segment(rule=MaxPoolRule(), calls=(call,), inputs=call.inputs, outputs=(call.node,), params=())
