"""Codes of 8, 4 or 2 bits between the least and the greatest value of every group, rounded up or down by chance.

As in ActNN (Chen et al., ICML 2021), but for scales of 48 bits a group in place of 32: with the least value in
float32, constant groups come back exactly, and an offset costs no precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from edgetune.codecs.plain import Plain
from edgetune.kernels import group_pack, group_unpack
from edgetune.kernels.geometry import LARGEST, Groups


@dataclass(frozen=True)
class Grouped(Plain):
    """`bits` an element, and 6 bytes for every `group` elements (a multiple of 32), in memory order.

    `stochastic` rounds such that the mean of what comes back is the value, with a seed that every encode draws from
    torch's global generator; a variance of a quarter of the squared step at most. Otherwise the nearer code is
    taken, and nothing is drawn. What `refuse` complains of comes back as NaN, the whole group, never as a number.
    Raises EdgetuneError for other bits or groups.
    """

    bits: int
    group: int = 256
    stochastic: bool = True

    name = "grouped"
    largest = LARGEST

    def __post_init__(self) -> None:
        self._layout.check()

    @property
    def _layout(self) -> Groups:
        return Groups(self.bits, self.group)

    def size(self, shape: Sequence[int]) -> int:
        return self._layout.size(math.prod(shape))

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        seed = int(torch.randint(2**63 - 1, (), device="cpu")) if self.stochastic else 0
        return group_pack(x.contiguous(), self.bits, self.group, seed, self.stochastic)

    def _decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return group_unpack(packed, self.bits, self.group, math.prod(shape)).view(tuple(shape))

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        """A step, or half of one to the nearer code; and what float32 rounds off: 2^-19 of the group's largest."""
        packed = group_pack(x.contiguous(), self.bits, self.group, 0, stochastic=False)
        low, step = self._layout.scales_of(packed, x.numel())
        largest = torch.maximum(low.abs(), (low + (2**self.bits - 1) * step).abs())
        steps = (1.0 if self.stochastic else 0.5) + 2.0**-16
        each = torch.where(step > 0, steps * step + 2.0**-19 * largest, 0)
        return each.repeat_interleave(self.group)[: x.numel()].view(x.shape)
