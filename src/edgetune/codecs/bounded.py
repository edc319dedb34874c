"""Codec with an error bound: cells of one width, zeros apart, and Rice's code for what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from edgetune import kernels
from edgetune.codecs.codec import Codec
from edgetune.errors import EdgetuneError
from edgetune.kernels.bounded_format import BLOCK, COARSEST, ENTRY, HEADER, bound_of, chunks_of


class Bounded(Codec):
    """Every value comes back within `bound` of what it was, in as few bytes as its block of 256 values needs.

    Zeros come back as zeros, and nothing else does: of a ReLU's map the mask can be read off. Values that are not
    finite, and blocks of which a value is more than 2^20 cells of twice the bound from zero, are kept exactly; so is
    everything with bound 0. What is not float32 is converted first. The bytes are the same for any number of threads.

    `most_bits` (at least 3) is a cap on the bits a value, header and table of chunks (8 bytes for 8192 values) aside:
    where values take more, the bound is doubled until they do not, and `used_bound` tells which one it was. Only
    values that are not finite, or beyond 2^120, can fail to fit then, and encode raises EdgetuneError.
    """

    name = "bounded"
    fixed = False
    keeps_zeros = True

    LEAST_BITS = 3.0
    """Finite values take no more at the largest bound."""
    SPARE = 16
    """Bytes beside the cap, for a last block that is not full."""

    def __init__(self, bound: float, most_bits: float | None = None) -> None:
        if not (math.isfinite(bound) and bound >= 0):
            raise EdgetuneError(f"codec bounded cannot keep to an error bound of {bound}: give 0 for exact values, or "
                                "a positive number")
        if most_bits is not None and not most_bits >= self.LEAST_BITS:
            raise EdgetuneError(f"codec bounded cannot hold every tensor in {most_bits} bits a value: give at least "
                                f"{self.LEAST_BITS:g}, or no cap")
        if most_bits is not None and most_bits < 32 and bound == 0:
            raise EdgetuneError("codec bounded cannot be exact and hold a cap on bits: give a bound above 0, or no cap")
        self.tolerance, self.most_bits = float(bound), most_bits

    def size(self, shape: Sequence[int]) -> int:
        count = math.prod(shape)
        exact = 4 * count + (count + BLOCK - 1) // BLOCK
        return HEADER + ENTRY * chunks_of(count) + min(exact, self._most(count))

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        """The bound used for x; 0 for zeros and for what is not finite."""
        used, _ = self._fitted(x.float())
        return torch.where((x != 0) & x.isfinite(), used, 0.0)

    def refuse(self, x: torch.Tensor) -> str | None:
        if self.most_bits is None or bool((x.abs() <= COARSEST).all()):
            return None
        return "has values that are not finite, or too large, for a codec with a cap on bits"

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float().contiguous()
        used, sizes = self._fitted(x)
        return kernels.bounded_encode(x, sizes, used)

    def _decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return kernels.bounded_decode(packed, math.prod(shape)).view(tuple(shape))

    def _fitted(self, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The least doubling of the bound that holds the cap, and the bytes of every chunk then."""
        used, most = self.tolerance, self._most(x.numel())
        while int((sizes := kernels.bounded_sizes(x, used)).sum()) > most:
            if used > COARSEST:
                raise EdgetuneError(f"these {x.numel()} values do not fit {self.most_bits} bits each by codec bounded "
                                    "at any bound, as some are not finite or too large: give no cap")
            used *= 2
        return used, sizes

    def _most(self, count: int) -> int:
        """Bytes that the chunks may take."""
        return 5 * count + 1 if self.most_bits is None else math.ceil(count * self.most_bits / 8) + self.SPARE


def used_bound(packed: torch.Tensor) -> float:
    """The bound that a tensor was packed with. Raises EdgetuneError for bytes that begin otherwise."""
    return bound_of(packed)
