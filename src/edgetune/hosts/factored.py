"""What the methods that keep Tucker factors have in common: all but how the factors are found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgetune.contract import LayerMethod
from edgetune.graph import Call
from edgetune.hosts.conv import input_gradient
from edgetune.hosts.tucker import Tucker
from edgetune.hosts.tucker_gradient import factored_weight_gradient
from edgetune.overlap import ConvGeometry


class FactoredMethod(LayerMethod):
    """A method whose kept tensors are a core and bases, by the names of `Tucker.kept`; gx is exact."""

    def refuse(self, call: Call) -> str | None:
        return None if call.kind == "conv" else f"is a {call.kind} layer, not a convolution: leave it exact"

    def grad_input(self, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return input_gradient(g, weight, geometry)

    def grad_weight(self, kept: Any, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return factored_weight_gradient(Tucker.of(kept), g, geometry)


def whole(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The map itself as its own core: kept without a copy, where factors would be no smaller."""
    return Tucker(x, {}).kept()


def working(x: torch.Tensor) -> torch.Tensor:
    """x in a precision in which decompositions can be computed."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wanted_ranks(sizes: Sequence[int], ranks: Sequence[int] | None, shares: Sequence[float]) -> list[int]:
    """A rank for each axis: those given, at most its size, or a share of its size, at least one."""
    if ranks is not None:
        return [min(rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    return [max(1, round(share * size)) for share, size in zip(shares, sizes, strict=True)]
