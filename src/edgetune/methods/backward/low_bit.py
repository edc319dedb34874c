"""Low-bit kept values: what backward reads is written in 2, 4 or 8 bits, rounded up or down by chance.

What it does
    The forward pass is the layer's own. What stays of it for backward is written in groups of `group` numbers: the
    least value, the step to the next code, and a code of `bits` bits a number. A number becomes one of the two codes
    beside it, the nearer one more often, such that the mean of what comes back is the number. Backward reads it back
    where it is needed, layer by layer. A value that several layers read is written once.

Shapes
    x (n c h w), weight (o i u v), gy (n o h' w'); m = n c h w numbers kept as uint8 (bytes)

What is kept (bytes)
    6 ceil(m / group) + 8 ceil(m bits / 64) instead of 4 m: 14.6 times less with 2 bits, 7.6 with 4, 3.9 with 8, for
    groups of 256. ReLU's signs take one bit a number beside that. Values of 1 KiB or less stay as they are.

What changes in the gradient or the answer
    The forward pass does not change, bit for bit, and neither does the gradient that goes on to the input where only
    convolutions, frozen norms, ReLUs, adds and pooling are. Gradients of weights are linear in what is kept: they are
    right in the mean, with a variance of at most step^2 / 4 for each number kept. Behind smooth activations, whose
    slope is read at what comes back, the gradient is close to right only. A new seed is drawn at every step, from
    torch's generator.

When not to use
    Where few pictures make a step, the noise of 2 bits may be larger than that of drawing the pictures. Values of 1 x 1
    maps gain little. Where a norm learns by a wide range of values in one group (squeeze-excite), take 8 bits.

Reference
    Chen et al., "ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training", ICML 2021,
    section 3; without its choice of bits by sample and layer. The least value of a group is kept in float32, so that
    constant groups are exact.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from edgetune.codecs import Codec, Grouped
from edgetune.contract import CodedMethod, Plan, Segment, Tensors
from edgetune.graph import Call, Graph
from edgetune.hosts.coded import coded_runs
from edgetune.methods.backward.exact import Exact


class LowBit(CodedMethod):
    """`bits` a number, and a scale for every `group` numbers."""

    method = "low_bit"

    bits: Literal[2, 4, 8] = 2
    group: int = Field(256, ge=32, le=65536, multiple_of=32)

    @classmethod
    def choices(cls) -> tuple[LowBit, ...]:
        return cls(bits=4), cls(bits=2)

    @property
    def label(self) -> str:
        return f"{self.bits}-bit kept"

    def refuse(self, call: Call) -> str | None:
        return None if call.kind == "conv" else f"is a {call.kind} layer, not a convolution: leave it out of the plan"

    def codec(self, x: torch.Tensor | None, state: Tensors) -> Codec:
        return Grouped(self.bits, self.group)

    @classmethod
    def claim(cls, graph: Graph, plan: Plan) -> list[Segment]:
        """Runs around the convolutions of the plan."""
        return coded_runs(graph, plan, cls, Exact())
