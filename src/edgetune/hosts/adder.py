"""The adder layer (AdderNet, CVPR 2020): its own products, and one autograd function that computes what is asked for.

With x (n c h w), weight (o i u v), l the output pixels and padding x = 0:

    y[o, l]  = - sum over taps and channels of |x - w|
    gx[i, l] =   sum over filters and taps of clip(w - x, -1, 1) gy
    gw[o, i] =   sum over l of (x - w) gy, scaled where asked to eta sqrt(k) / max(||gw||_2, 1e-12), k = numel(w)

Neither gradient is the true one, whose slopes are signs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from edgetune import kernels
from edgetune.errors import EdgetuneError
from edgetune.hosts import conv
from edgetune.overlap import ConvGeometry

ETA = 0.2
"""The published strength of adaptive scaling."""

RECIPE: Mapping[str, Any] = {"learning_rate": 0.1, "weight_decay": 5e-4, "clip_norm": None}
"""How adder networks are trained, as published. Gradients as long as ETA makes them are not clipped: that would all but
stop the training."""
_SMALLEST_NORM = 1e-12


def _windows(geometry: ConvGeometry) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
    """Stride, pads, dilation and groups, as the kernels take them."""
    top, bottom, left, right = geometry.pads
    return geometry.stride, (top, left, bottom, right), geometry.dilation, geometry.groups


def differences(x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """The layer's forward: x (n c h w), weight (o i u v) -> y (n o h' w'), in the memory order of x."""
    return kernels.adder_conv(x, weight, *_windows(geometry))


def input_gradient(g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """gx (n c h w) from g (n o h' w')."""
    return kernels.adder_conv_input_gradient(g, x, weight, *_windows(geometry))


def weight_gradient(x: torch.Tensor, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """gw (o i u v): a convolution's, less w times the sum of g, as taps on padding see x = 0 and count like others."""
    product = conv.weight_gradient(x, g, geometry)
    return product - weight.to(product.dtype) * g.sum((0, 2, 3), dtype=product.dtype)[:, None, None, None]


def scaled(gw: torch.Tensor, eta: float) -> torch.Tensor:
    """gw with the norm eta sqrt(numel), so that all layers learn at one pace; a norm below 1e-12 counts as that."""
    norm = torch.linalg.vector_norm(gw).clamp(min=_SMALLEST_NORM)
    return gw * (eta * gw.numel() ** 0.5 / norm)


class AdderFunction(torch.autograd.Function):
    """apply(x, weight, geometry, eta) -> y; with `eta` None the weight's gradient stays as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                eta: float | None) -> torch.Tensor:
        ctx.geometry, ctx.eta = geometry, eta
        ctx.save_for_backward(x, weight)
        return differences(x, weight, geometry)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise EdgetuneError("an adder layer computes its own gradient, which cannot be differentiated again: call "
                                "backward without create_graph=True")
        x, weight = ctx.saved_tensors
        gx = input_gradient(g, x, weight, ctx.geometry) if ctx.needs_input_grad[0] else None
        gw = weight_gradient(x, g, weight, ctx.geometry) if ctx.needs_input_grad[1] else None
        if gw is not None and ctx.eta is not None:
            gw = scaled(gw, ctx.eta)
        return gx, gw, None, None


def adder(x: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry, eta: float | None = ETA) -> torch.Tensor:
    """The layer, with AdderNet's gradients: x (n c h w), weight (o i u v) -> y (n o h' w')."""
    y: torch.Tensor = AdderFunction.apply(x, weight, geometry.at(int(x.shape[2]), int(x.shape[3])), eta)
    return y
