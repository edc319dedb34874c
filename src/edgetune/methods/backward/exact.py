"""Exact gradients: plain back-propagation through a convolution, in the host that every method shares.

What it does
    Computes the same gradients as autograd, but keeps only what they read: the input when the weight learns, and
    nothing when only the gradient passes through. Stock torch keeps the input of a frozen convolution too.

Shapes
    x (n c h w), weight (o i u v), gy (n o h' w'); kept (n c h w)

What is kept (bytes)
    4 n c h w where the weight learns; 0 where it is frozen.

What changes in the gradient or the answer
    Nothing.

When not to use
    Where memory or time are short: see gradient_filter and pooled_chain.

Reference
    Rumelhart, Hinton and Williams, "Learning representations by back-propagating errors", Nature 323, 1986.
"""

from __future__ import annotations

from typing import Any

import torch

from edgetune.contract import LayerMethod
from edgetune.graph import Call, Graph
from edgetune.hosts.conv import both_gradients, input_gradient, weight_gradient
from edgetune.overlap import ConvGeometry


class Exact(LayerMethod):
    """No settings: the gradient as it is."""

    method = "exact"

    def exact_on(self, graph: Graph) -> bool:
        return True

    def refuse(self, call: Call) -> str | None:
        return None if call.kind in ("conv", "linear", "norm") else f"is a {call.kind}, which has nothing to learn: " \
                                                                    "leave it out of the plan"

    def grad_input(self, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return input_gradient(g, weight, geometry)

    def grad_weight(self, kept: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return weight_gradient(kept, g, geometry)

    def gradients(self, kept: Any, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                  wants_input: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if kept is None or not wants_input:
            return super().gradients(kept, g, weight, geometry, wants_input)
        return both_gradients(kept, g, weight, geometry)
