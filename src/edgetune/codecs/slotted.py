"""The codec with an error bound, for stores of many samples: every tensor of a shape takes the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edgetune.codecs.bounded import Bounded
from edgetune.kernels.bounded_format import told_size

FINEST = 2.0**-10
"""The bound that is tried first, in root mean squares of the values."""


class Slotted(Bounded):
    """The least bound at which the values take `most_bits` each, of 2^-10 root mean squares and its doublings.

    The compressible come back nearer than the others, zeros as zeros; the rest of a slot is zeros. What `refuse`
    complains of must not come here.
    """

    fixed = True

    def __init__(self, most_bits: float = 4.0) -> None:
        super().__init__(1.0, most_bits)

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        return self._finest(x).bound(x)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        packed = self._finest(x).encode(x)
        return F.pad(packed, (0, self.size(x.shape) - packed.numel()))

    def _decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return super()._decode(packed[: told_size(packed)], shape)

    def _finest(self, x: torch.Tensor) -> Bounded:
        spread = float(torch.linalg.vector_norm(x.double())) / max(x.numel(), 1) ** 0.5
        return Bounded(FINEST * spread or 1.0, self.most_bits)
