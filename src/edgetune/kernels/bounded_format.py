"""What the versions of the error-bounded codec share: sizes, header, steps. native/bounded.h describes the bytes."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from edgetune.errors import EdgetuneError

BLOCK = 256
CHUNK = 32 * BLOCK
HEADER = 32
ENTRY = 8
MAGIC = 0x31425445
"""ETB1"""

_HEAD = struct.Struct("<IIQdQ")
_HAIR = 2.0**-9
FINEST, COARSEST = 2.0**-100, 2.0**120


class Steps(NamedTuple):
    """Half of a cell, as float32, and what takes a value to its cell; both 0 where values are kept exactly."""

    e: float
    scale: float


def steps_of(bound: float) -> Steps:
    """The cells of an error bound; 0 for one below 2^-100, which keeps values exactly.

    Half a cell is a little less than the bound: of a value x = s * 2e (|s| up to 2^12), rounding s adds at most
    |s| 2^-22 e to the error and rounding (2q+1)e at most (2|s|+1) 2^-24 e, together less than 2^-9 e.
    """
    if bound < FINEST:
        return Steps(0.0, 0.0)
    wanted = min(bound, COARSEST) * (1 - _HAIR)
    e = torch.tensor(wanted, dtype=torch.float32)
    if e.item() > wanted:
        e = torch.nextafter(e, torch.zeros_like(e))
    return Steps(e.item(), torch.tensor(0.5 / e.item(), dtype=torch.float32).item())


def chunks_of(count: int) -> int:
    """Chunks of a tensor of so many values."""
    return (count + CHUNK - 1) // CHUNK


def packed_size(sizes: Tensor) -> int:
    """Bytes of a packed tensor whose chunks take `sizes`."""
    return HEADER + ENTRY * sizes.numel() + int(sizes.sum())


def starts_of(sizes: Tensor) -> Tensor:
    """Where chunks of these bytes begin in the packed tensor, and where the last one ends: int64 (chunks + 1)."""
    first = sizes.new_full((1,), HEADER + ENTRY * sizes.numel(), dtype=torch.int64)
    return torch.cat([first, sizes.long()]).cumsum(0)


def head_of(count: int, bound: float, size: int) -> Tensor:
    """The header without its check: uint8 (HEADER)."""
    return torch.frombuffer(bytearray(_HEAD.pack(MAGIC, 0, count, bound, size)), dtype=torch.uint8)


def bound_of(packed: Tensor, count: int | None = None) -> float:
    """The bound with which a tensor was packed. Raises EdgetuneError where the header isn't one of `count` values."""
    size = packed.numel()
    if size < HEADER:
        raise broken(f"{size} bytes are not even a header")
    magic, _, values, bound, told = _read_head(packed)
    if magic != MAGIC:
        raise broken("they do not begin as such")
    if told != size:
        raise broken(f"there are {size} bytes and should be {told}")
    if count is not None and values != count:
        raise broken(f"they hold {values} values, and {count} are asked for")
    if not (math.isfinite(bound) and bound >= 0):
        raise broken(f"their bound is {bound}")
    return float(bound)


def told_size(packed: Tensor) -> int:
    """How many bytes a packed tensor says it takes, of some with more behind it; 0 where they are no header."""
    return _read_head(packed)[4] if packed.numel() >= HEADER else 0


def _read_head(packed: Tensor) -> tuple[int, int, int, float, int]:
    """Magic number, check, values, bound and bytes, as they stand in the header."""
    return _HEAD.unpack(bytes(packed[:HEADER].tolist()))  # type: ignore[return-value]


def broken(reason: str) -> EdgetuneError:
    """The error of bytes that can't be decoded."""
    return EdgetuneError(f"these bytes are no tensor by the error-bounded codec ({reason}): read what was written, "
                         "whole")


def unfit_sizes() -> EdgetuneError:
    """The error of sizes that are not those of the values to be packed."""
    return EdgetuneError("these sizes are not those of these values: give what bounded_sizes says of the same tensor "
                         "and bound")
