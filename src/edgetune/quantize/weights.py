"""Three ways to hold a tensor of integers between steps: frozen, as a float that is rounded, or as int8 itself.

Of a weight a window alone can learn: that part is held in one of these ways beside the frozen whole. Each gives
`operands(role)`: what the rules read, by name. Under the role itself stands the tensor that autograd gives a gradient
to; where that holds no numbers, the integers stand beside it as `<role>.integers`, and where it is a part, all of the
weight as `<role>.frozen`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgetune.methods.backward.sparse_update import SparseUpdate, window_axis
from edgetune.overlap import ConvGeometry

PART = 2**12
"""Numbers that are moved at a time, in whole filters."""


class Held(nn.Module):
    """An integer tensor within [-limit, limit]; here it is frozen, in its own integer type."""

    value: torch.Tensor

    def __init__(self, integers: torch.Tensor, limit: int) -> None:
        super().__init__()
        self.limit, self.dtype = limit, integers.dtype
        self._hold(integers)

    def _hold(self, integers: torch.Tensor) -> None:
        self.register_buffer("value", integers.clone())

    def operands(self, role: str) -> dict[str, torch.Tensor]:
        """The tensors by the names under which the rules read them."""
        return {role: self.value}

    def integers(self) -> torch.Tensor:
        """The integers as they stand, in their own type."""
        return self.value.detach().round().clamp(-self.limit, self.limit).to(self.dtype)

    def learning(self, values: torch.Tensor) -> torch.Tensor:
        """Of `values` by output channel (o), those of the channels that learn."""
        return values


class Rounded(Held):
    """Kept as float32 and rounded in the forward pass: steps below one integer add up until they show."""

    def _hold(self, integers: torch.Tensor) -> None:
        self.value = nn.Parameter(integers.float())


class Stepped(Held):
    """Kept as integers: a step must be rounded when it is made (see `StochasticSGD`). One byte a weight.

    Autograd gives gradients to floats only, so a `handle` of one element, expanded to the shape, receives them.
    """

    def _hold(self, integers: torch.Tensor) -> None:
        super()._hold(integers)
        self.handle = nn.Parameter(torch.zeros((), device=integers.device).expand(integers.shape))

    def operands(self, role: str) -> dict[str, torch.Tensor]:
        return {role: self.handle, f"{role}.integers": self.value}

    def integers(self) -> torch.Tensor:
        return self.value.clone()

    # the handle holds nothing, and torch refuses to load into a tensor whose elements share memory
    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}handle"]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        handle = self._parameters.pop("handle")
        super()._load_from_state_dict(*args, **kwargs)
        self._parameters["handle"] = handle

    @torch.no_grad()
    def move(self, step: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Add a float step, rounded up or down by chance so that its mean is kept; then clip."""
        # part by part: in 64 bits a whole weight would take many times its bytes
        filters = max(1, PART // max(1, self.value[:1].numel()))
        for value, change in zip(self.value.split(filters), step.split(filters), strict=True):
            chance = torch.rand(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            moved = chance.add_(value).add_(change).floor_()
            value.copy_(moved.clamp_(-self.limit, self.limit))


class Windowed(Held):
    """A convolution's weight (o i u v) of which the window that `method` says learns, held as `state` does.

    The frozen whole stays as it was; the learning part stands beside it, and goes before it.
    """

    def __init__(self, integers: torch.Tensor, limit: int, method: SparseUpdate, geometry: ConvGeometry,
                 state: type[Held]) -> None:
        super().__init__(integers, limit)
        self.method, self.geometry = method, geometry
        self.part = state(method.part(integers, geometry).contiguous(), limit)

    def operands(self, role: str) -> dict[str, torch.Tensor]:
        return {**self.part.operands(role), f"{role}.frozen": self.value}

    def integers(self) -> torch.Tensor:
        weight = self.value.clone()
        self.method.part(weight, self.geometry).copy_(self.part.integers())
        return weight

    def learning(self, values: torch.Tensor) -> torch.Tensor:
        return self.method.part(values, self.geometry) if window_axis(self.geometry)[0] == 0 else values
