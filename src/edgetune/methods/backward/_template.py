"""One line: what this method changes in the backward pass. Copy this file, and give it a test of the same name.

What it does
    A paragraph a colleague can follow without the paper.

Shapes
    x (n c h w), weight (o i u v), gy (n o h' w'); what is kept, and its shape

What is kept (bytes)
    The formula, and what stays when the weight is frozen.

What changes in the gradient or the answer
    Identical, bounded or changed, and under which knob it is exact.

When not to use
    Where it loses accuracy, or gains nothing.

Reference
    Authors, title, venue, year, equations; what is corrected here.
"""

from __future__ import annotations

import torch
from pydantic import Field

from edgetune.contract import LayerMethod
from edgetune.graph import Call
from edgetune.methods.backward.exact import Exact
from edgetune.overlap import ConvGeometry


def rounded(x: torch.Tensor, step: float) -> torch.Tensor:
    """Pure functions on tensors come first: x (any shape) to the nearest multiple of `step`."""
    return (x / step).round() * step


class Rounded(LayerMethod):
    """Then one frozen settings class, its knobs with units in their names. This one keeps its input rounded."""

    # method = "rounded"   registers the class; without a name it stays a template

    step: float = Field(0.01, gt=0)

    def refuse(self, call: Call) -> str | None:
        return None if call.kind == "conv" else f"is a {call.kind} layer, not a convolution: leave it exact"

    def save(self, x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return rounded(x, self.step)

    def grad_input(self, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return Exact().grad_input(g, weight, geometry)

    def grad_weight(self, kept: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return Exact().grad_weight(kept, g, geometry)
