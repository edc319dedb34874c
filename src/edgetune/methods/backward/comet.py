"""COMET: what layers keep is written with a bounded error, which follows the noise it may cause.

What it does
    The values that backward reads are quantized to within a bound and entropy coded, once for all that read them: the
    input of a convolution also says what the ReLU in front of it masks and what the norm's scale learns. Whatever an
    activation or a product gave is made again. While training, the bound of every convolution's input follows the
    gradient: the noise that the error puts on the weight gradient is held at a share of it. Values that no
    convolution reads as they are stay at the bound of the `start`.

Shapes
    x (n c h w) any value that is kept; gy (n o h' w'); gw (o i u v); bytes as many as the values need

What is kept (bytes)
    Data-dependent: a bit a value for where the zeros are, and the entropy of the others: about 1 + r log2(2 s / bound)
    bits a value, with r the share that is not zero, and s their standard deviation. Never more than `most_bits` a
    value: where the data need more, the bound of that step is widened. Max-pooling keeps one byte an output; ReLU6
    one bit a value. Stock torch keeps 32 bits a value of every convolution's, norm's and activation's input.

What changes in the gradient or the answer
    The forward pass does not change, nor do gradients of inputs: masks are exact, as nothing but zero becomes zero. On
    the gradient of a weight comes noise with zero mean and, for output channel o, standard deviation
    bound sqrt(r / 3) ||gy_o||, as errors are spread evenly within the bound and are independent of gy. The bound is
    chosen so that its root mean square over channels is `tolerance` times that of the gradient itself. The scale of a
    norm that is small beside its norm's others stays as it is (see edgetune.hosts.tail).

When not to use
    Where time counts more than bytes take low_bit. Values without zeros and with a long tail gain less. Running
    statistics stay frozen.

Reference
    Jin et al., "COMET: a novel memory-efficient deep learning training framework by using error-bounded lossy
    compression", PVLDB 15(4), 2021. Its law has a fitted constant, sigma = 0.32 mean|gy| sqrt(n r) bound, which
    `COMET.published()` uses with the published tolerance and interval; the law above is exact and needs none. Its
    reference is the mean momentum, here it is the gradient of the same step. Values of norms, and one copy for all,
    are ours.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from edgetune.codecs import Codec
from edgetune.codecs.bounded import Bounded
from edgetune.contract import CodedMethod, Plan, Segment, Tensors
from edgetune.graph import Call, Graph
from edgetune.hosts.coded import coded_runs
from edgetune.methods.backward.exact import Exact

FITTED = 0.32
"""The constant of the published law."""
WIDEST = 0.25
"""The widest bound, in root mean squares of the values: beyond, errors depend on the values."""


def exact_noise(bound: float, share: torch.Tensor, gy: torch.Tensor) -> torch.Tensor:
    """The standard deviation of the noise on the gradient of a weight, root mean square over output channels.

    `share` of the values is not zero; gy (n o h w).
    """
    return bound * (share / 3).sqrt() * torch.linalg.vector_norm(gy) / gy.shape[1] ** 0.5


def fitted_noise(bound: float, share: torch.Tensor, gy: torch.Tensor) -> torch.Tensor:
    """The same by the published law."""
    return FITTED * gy.abs().mean() * (len(gy) * share).sqrt() * bound


LAWS = {"exact": exact_noise, "fitted": fitted_noise}


class COMET(CodedMethod):
    """Noise of at most `tolerance` of a weight's gradient; `most_bits` a value; the bound follows every `interval`
    steps and is `start` root mean squares of the values before; `law` says how noise follows from the bound."""

    method = "comet"

    tolerance: float = Field(0.05, gt=0)
    most_bits: float = Field(8.0, ge=Bounded.LEAST_BITS, le=32)
    interval: int = Field(16, ge=1)
    start: float = Field(0.02, gt=0, le=WIDEST)
    law: Literal["exact", "fitted"] = "exact"

    @classmethod
    def choices(cls) -> tuple[COMET, ...]:
        """A budget has to be held by whatever comes: with few bits for the least compressible of maps."""
        return (cls(most_bits=4),)

    @classmethod
    def published(cls) -> COMET:
        """The published setting."""
        return cls(tolerance=0.01, interval=1000, law="fitted")

    def refuse(self, call: Call) -> str | None:
        return None if call.kind == "conv" else f"is a {call.kind} layer, not a convolution: leave it out of the plan"

    def state_of(self, call: Call) -> dict[str, torch.Tensor]:
        return {"comet": torch.tensor([float("nan"), 0.0])}

    def codec(self, x: torch.Tensor | None, state: Tensors) -> Codec:
        if x is None or x.is_meta:
            return Bounded(1.0, self.most_bits)
        bound = float(state["comet"][0]) if state else float("nan")
        return Bounded(bound if bound == bound else self.start * _spread(x), self.most_bits)

    def learn(self, x: torch.Tensor, gy: torch.Tensor, gw: torch.Tensor, state: Tensors) -> None:
        own = state["comet"]
        if own.is_meta:
            return
        if int(own[1]) % self.interval == 0:
            noise = LAWS[self.law](1.0, torch.count_nonzero(x) / x.numel(), gy.float())
            wanted = self.tolerance * gw.float().square().mean().sqrt() / noise
            # no gradient, no noise: the bound stays
            if bool(wanted.isfinite()) and bool(wanted > 0):
                own[0] = wanted.clamp(max=WIDEST * _spread(x))
        own[1] += 1

    @classmethod
    def claim(cls, graph: Graph, plan: Plan) -> list[Segment]:
        """Runs around the convolutions of the plan."""
        return coded_runs(graph, plan, cls, Exact())


def _spread(x: torch.Tensor) -> float:
    """The root mean square of the values that are not zero; 1 where there are none, or some are not finite."""
    spread = float(torch.linalg.vector_norm(x.float())) / max(int(torch.count_nonzero(x)), 1) ** 0.5
    return spread if 0 < spread < math.inf else 1.0
