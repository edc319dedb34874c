"""MobileTL: inverted residual blocks of which only the convolutions' inputs and packed bits are kept.

What it does
    Convolutions learn exactly. Norms inside a block learn their shift only, and keep nothing; the norm that closes a
    block learns its scale too, and keeps its small input. ReLU and ReLU6 keep their exact one-bit slope. Hard-swish
    keeps one bit (slope 1 where a >= 0, as published) or two (below). Squeeze-excite's product is not kept: the
    convolution behind it makes it again. `last_blocks` writes the plan that trains the last blocks.

Shapes
    x, a (n c h w), a the input of hard-swish; gy (n o h' w'); bits ceil(n c h w / 8) bytes for each bit of an element

What is kept (bytes)
    4 n c h w a learning convolution, and as much for the map that squeeze-excite scales, in place of the input of the
    convolution behind it; n c h w / 8 a ReLU, `hardswish_bits` times that a hard-swish; 4 n c h w for a block's last
    norm. Stock torch keeps the input of every norm and activation too.

What changes in the gradient or the answer
    The forward pass does not change. Without hard-swish gradients are exact. One bit takes hard-swish for ReLU in
    backward. With two bits the slope has four levels: the means of the true slope over a < -t, -t <= a < 0,
    0 <= a < t and a >= t under a standard normal a, with t = 0.965, for which these levels have the smallest mean
    square error. Other smooth activations, and a hard-swish behind no convolution of the plan, stay exact.

When not to use
    One bit through many hard-swish layers loses the direction of the gradient: take two. Where the inputs of
    convolutions are too much to keep, use pooled_chain, alone or in front. Running statistics stay frozen, those of
    the last norms too. The published 8-bit frozen blocks are no part of the method, but of training by any plan
    (`edgetune train --frozen-bits 8`); hard-swish in front of what learns has no integer step.

Reference
    Chiang et al., "MobileTL: On-Device Transfer Learning with Inverted Residual Blocks", AAAI 2023; the two-bit slope
    and the product made again are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from edgetune import kernels
from edgetune.contract import LayerMethod, Method, Needs, Plan, Segment, Tensors, one_call
from edgetune.errors import PlanError
from edgetune.graph import Call, Graph
from edgetune.hosts.gated import gated_conv
from edgetune.hosts.grid import order
from edgetune.methods.backward.exact import Exact
from edgetune.overlap import ConvGeometry

THRESHOLD = 0.965
"""Where the two-bit slope steps, on either side of zero."""


def _density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _below(z: float) -> float:
    return math.erf(z / math.sqrt(2)) / 2 + 0.5


def slope_levels(threshold: float = THRESHOLD) -> tuple[float, float]:
    """The mean slope of hard-swish over 0 <= a < threshold and over a >= threshold, for a standard normal a.

    The slope is 1/2 + a/3 up to a = 3 and 1 from there; below zero it is one minus that of -a, and so are the means.
    """
    inner = (_density(0) - _density(threshold)) / 3 / (_below(threshold) - 0.5) + 0.5
    rising = (_below(3) - _below(threshold)) / 2 + (_density(threshold) - _density(3)) / 3
    return inner, (rising + 1 - _below(3)) / (1 - _below(threshold))


@dataclass(frozen=True)
class HardswishRule:
    """Hard-swish forward; a slope of one or two bits backward."""

    bits: Literal[1, 2]

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors,
                needs: Needs) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        a = xs[0]
        if not needs.inputs[0]:
            return (F.hardswish(a),), {}
        # packed as "not below zero": a channel that is zero everywhere stays open
        kept = {"positive": ~kernels.mask_pack(a, -math.inf, 0.0),
                "last": a.new_empty((int(kernels.is_channels_last(a)), 0))}
        if self.bits == 2:
            kept["inner"] = kernels.mask_pack(a, -THRESHOLD, THRESHOLD)
        return (F.hardswish(a),), kept

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        if gys[0] is None or not needs.inputs[0]:
            return (None,), {}
        gy = gys[0].contiguous(memory_format=order(bool(kept["last"].shape[0])))
        if self.bits == 1:
            return (kernels.mask_apply(gy, kept["positive"]),), {}
        inner, outer = slope_levels()
        # the slope is 1/2 plus or minus a distance, which depends on |a| only
        distance = (gy * (outer - 0.5)).add_(kernels.mask_apply(gy, kept["inner"]), alpha=inner - outer)
        upper = kernels.mask_apply(distance, kept["positive"])
        return ((gy / 2).sub_(distance).add_(upper, alpha=2),), {}


class MobileTL(LayerMethod):
    """Convolutions exact; `hardswish_bits` bits an element for the slope of hard-swish: 1 (published) or 2."""

    method = "mobiletl"

    hardswish_bits: Literal[1, 2] = 2

    @property
    def label(self) -> str:
        return f"mobiletl, {self.hardswish_bits} bit" + "s" * (self.hardswish_bits > 1)

    def exact_on(self, graph: Graph) -> bool:
        return all(call.function != "hardswish" for call in graph.calls)

    def refuse(self, call: Call) -> str | None:
        return None if call.kind == "conv" else f"is a {call.kind} layer, not a convolution: leave it exact"

    def idle_on(self, graph: Graph) -> str | None:
        if any(call.function == "hardswish" or call.kind == "scale" for call in graph.calls) or _block_ends(graph):
            return None
        return ("the network has neither hard-swish nor squeeze-excite nor inverted residual blocks, and anywhere else "
                "mobiletl is what exact gradients are: use --method exact")

    def grad_input(self, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return Exact().grad_input(g, weight, geometry)

    def grad_weight(self, kept: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return Exact().grad_weight(kept, g, geometry)

    @classmethod
    def claim(cls, graph: Graph, plan: Plan) -> list[Segment]:
        """Hard-swish behind the convolutions of the plan, and squeeze-excite's product between them."""
        segments: list[Segment] = []
        for call in graph.calls:
            own = _settings_in_front(graph, plan, call)
            if own is None:
                continue
            if call.function == "hardswish" and len(call.out_shape) == 4 and not graph.overwrites_for_others(call):
                segments.append(one_call(HardswishRule(own.hardswish_bits), call))
            # both factors from convolutions of this method: no other method's run can hold the product
            if call.kind == "conv" and (gated := gated_conv(graph, call, own)) is not None and all(
                    _settings_in_front(graph, plan, graph[node]) for node in gated.inputs):
                segments.append(gated)
        return segments


def _settings_in_front(graph: Graph, plan: Plan, call: Call) -> MobileTL | None:
    """The settings of the convolution that `call` is or reads through norms and activations; None for others."""
    while call.followed and call.kind in ("activation", "norm", "identity"):
        call = graph[call.inputs[0]]
    own = plan.settings(call.name, MobileTL) if call.kind == "conv" else None
    return own if isinstance(own, MobileTL) else None


def closes_block(graph: Graph, norm: Call) -> bool:
    """Whether a norm ends in a linear bottleneck: no activation behind it, nor behind the adds that read it."""
    readers = [graph[node] for node in norm.consumers]
    return norm.kind in ("norm", "add") and all(
        reader.kind != "activation" and (reader.kind != "add" or closes_block(graph, reader)) for reader in readers)


def _block_ends(graph: Graph) -> list[int]:
    return [i for i, call in enumerate(graph.calls) if call.kind == "norm" and closes_block(graph, call)]


def last_blocks(graph: Graph, count: int, method: Method) -> Plan:
    """The plan in which the last `count` inverted residual blocks learn, and all behind them.

    Convolutions that the method refuses are exact. Norms learn their shift, those that close a block their scale too.
    The first block takes the stem with it.
    Raises PlanError when the graph has fewer blocks.
    """
    ends = _block_ends(graph)
    if not 1 <= count <= len(ends):
        raise PlanError(f"the last {count} inverted residual blocks are asked for, but the network has {len(ends)}: "
                        "ask for at least one and at most as many as it has, or for convolutions with --last")
    start = ends[-count - 1] + 1 if count < len(ends) else 0
    layers, learns = dict[str, tuple[Method, ...]](), dict[str, tuple[str, ...]]()
    for index, call in enumerate(graph.calls[start:], start):
        if call.kind in ("conv", "norm", "linear"):
            wanted = ("bias",) if call.kind == "norm" and index not in ends else ("weight", "bias")
            learns[call.name] = tuple(role for role in wanted if role in call.params)
        if call.kind == "conv" and method.refuse(call) is None:
            layers[call.name] = (method,)
    return Plan(input_shape=graph.input_shape, layers=layers, learns=learns)
