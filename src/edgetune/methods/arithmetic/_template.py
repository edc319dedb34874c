"""One line: what this method makes of a convolution's numbers. Copy this file, and give it a test of the same name.

What it does
    A paragraph a colleague can follow without the paper.

Shapes
    x (n c h w), weight (o i u v), y (n o p q)

What is kept (bytes)
    What training keeps of a layer, and what its weights take in the packed network.

What changes in the gradient or the answer
    The answer, and the surrogate gradients, as equations.

When not to use
    Where it loses accuracy, or gains nothing.

Reference
    Authors, title, venue, year, equations; what is corrected here.
"""

from __future__ import annotations

import torch
from pydantic import Field

from edgetune.contract import ArithmeticMethod
from edgetune.hosts.conv import convolve
from edgetune.overlap import ConvGeometry


def rounded(x: torch.Tensor, step: float) -> torch.Tensor:
    """Pure functions on tensors come first: x to the nearest multiple of `step`, with the gradient of x."""
    return x + ((x / step).round() * step - x).detach()


class Rounded(ArithmeticMethod):
    """Then one frozen settings class. This one rounds weights."""

    # method = "rounded"   registers the class; without a name it stays a template

    step: float = Field(0.01, gt=0)

    def quantize_weight(self, weight: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        return rounded(weight, self.step)

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                 progress: torch.Tensor) -> torch.Tensor:
        return convolve(x, self.quantize_weight(weight, progress), None, geometry)
