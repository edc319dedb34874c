"""Squeeze-excite's product and the convolution behind it as one segment: exact, and a full map less is kept.

Stock torch keeps the map and its gate for the product, and the product for the convolution. Here the product is made
once more in backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgetune.contract import LayerMethod, Needs, Segment, Tensors, one_call
from edgetune.graph import Call, Graph
from edgetune.hosts.conv import ConvRule


@dataclass(frozen=True)
class GatedConvRule:
    """conv(a * b), with a map (n c h w) and a gate (n c 1 1) in either order; `conv` is the convolution's own segment.

    Its method must keep the input as it is.
    """

    conv: Segment

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors,
                needs: Needs) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        a, b = xs
        ys, kept = self.conv.rule.forward(self.conv, (a * b,), params, self._needs(needs))
        if kept.pop("x", None) is not None or any(needs.inputs):
            kept |= {"a": a, "b": b}
        return ys, kept

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        if "a" not in kept:
            (_,), grads = self.conv.rule.backward(self.conv, kept, gys, params, self._needs(needs))
            return (None, None), grads
        a, b = kept["a"], kept["b"]
        (g,), grads = self.conv.rule.backward(self.conv, {**kept, "x": a * b}, gys, params, self._needs(needs))
        if g is None:
            return (None, None), grads
        to_a, to_b = (None if not wanted else (g * other).sum_to_size(own.shape)
                      for wanted, own, other in zip(needs.inputs, (a, b), (b, a), strict=True))
        return (to_a, to_b), grads

    def _needs(self, needs: Needs) -> Needs:
        return Needs((any(needs.inputs),), needs.params)


def gated_conv(graph: Graph, conv: Call, method: LayerMethod) -> Segment | None:
    """The segment of a convolution that alone reads squeeze-excite's product, or None where it does not."""
    if not conv.followed or not conv.inputs:
        return None
    product = graph[conv.inputs[0]]
    if product.kind != "scale" or len(product.consumers) != 1 or graph.overwrites_for_others(product):
        return None
    rule = GatedConvRule(one_call(ConvRule(method), conv))
    return Segment(rule=rule, calls=(product, conv), inputs=product.inputs, outputs=(conv.node,),
                   params=tuple(conv.params.values()))
