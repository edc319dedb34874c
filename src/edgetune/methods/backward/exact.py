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

import torch
import torch.nn.functional as F

from edgetune.contract import LayerMethod
from edgetune.graph import Call, Graph
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
        n, (top, bottom, left, right) = g.shape[0], geometry.pads
        height, width = geometry.in_hw
        if geometry.symmetric:
            x = g.new_empty(1).expand(n, geometry.in_channels, height, width)
            return _backward(g, x, weight.to(g.dtype), geometry, (top, left), wants_input=True)
        padded = g.new_empty(1).expand(n, geometry.in_channels, height + top + bottom, width + left + right)
        gx = _backward(g, padded, weight.to(g.dtype), geometry, (0, 0), wants_input=True)
        return gx[:, :, top:top + height, left:left + width]

    def grad_weight(self, kept: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        top, bottom, left, right = geometry.pads
        shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
        weight = g.new_empty(1).expand(shape)
        if geometry.symmetric:
            return _backward(g, kept.to(g.dtype), weight, geometry, (top, left), wants_input=False)
        padded = F.pad(kept.to(g.dtype), (left, right, top, bottom))
        return _backward(g, padded, weight, geometry, (0, 0), wants_input=False)


def _backward(g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
              padding: tuple[int, int], wants_input: bool) -> torch.Tensor:
    # torch computes only what the mask asks for; the tensor that is not read may be a stand-in without memory
    grads = torch.ops.aten.convolution_backward(g, x, weight, None, geometry.stride, padding, geometry.dilation,
                                                False, (0, 0), geometry.groups, (wants_input, not wants_input, False))
    return grads[0] if wants_input else grads[1]
