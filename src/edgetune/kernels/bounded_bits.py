"""Bits of the error-bounded codec in plain torch, written and read one by one, many rows of numbers at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetune.kernels.bounded_format import BLOCK

HIGH_BITS = 3
_ODD = 0x9E3779B97F4A7C15 - 2**64


class Numbers(NamedTuple):
    """Rows of numbers u (b 256) of which the first n (b) count, and how they are written: k and bytes (b)."""

    u: Tensor
    n: Tensor
    k: Tensor
    size: Tensor


def check_of(part: Tensor, seed: int) -> int:
    """check_of in bounded.h."""
    words = F.pad(part, (0, -part.numel() % 8)).view(-1, 8).reshape(-1)
    numbers = torch.empty_like(words).copy_(words).view(torch.int64)
    powers = torch.full_like(numbers, _ODD).cumprod(0)
    total = (int((numbers * powers).sum()) + seed + 6 + part.numel()) * _ODD % 2**64
    return (total ^ total >> 29) * _ODD % 2**64 >> 32


def bytes_of(words: Tensor) -> Tensor:
    """int64 (n), each below 2^32 -> uint8 (4n)."""
    shifts = torch.arange(0, 32, 8, device=words.device)
    return (words[:, None] >> shifts & 255).to(torch.uint8).view(-1)


def words_of(part: Tensor, width: int) -> Tensor:
    """uint8 (width n) -> int64 (n)."""
    shifts = torch.arange(0, 8 * width, 8, device=part.device)
    return (part.view(-1, width).long() << shifts).sum(1)


def in_front(flags: Tensor) -> Tensor:
    """The positions of what is set in every row, in front: (b c) -> (b c)."""
    return (~flags).to(torch.uint8).argsort(dim=1, stable=True)


def places(like: Tensor, count: int = BLOCK) -> Tensor:
    return torch.arange(count, device=like.device)


class Writer:
    """Bits of a group of blocks; `at` (b) is the bit at which each row goes on."""

    def __init__(self, sizes: Tensor) -> None:
        self.bits = sizes.new_zeros(8 * int(sizes.sum()), dtype=torch.uint8)
        self.at = 8 * (sizes.cumsum(0) - sizes)

    def put(self, values: Tensor, count: Tensor | int, width: Tensor | int, where: Tensor) -> None:
        """The `width` lowest bits of the first `count` values of the rows `where`; whole bytes."""
        n, w = (torch.as_tensor(v, device=self.at.device).expand_as(self.at) * where for v in (count, width))
        first = self.at[:, None] + places(values, values.shape[1]) * w[:, None]
        inside = places(values, values.shape[1]) < n[:, None]
        for bit in range(int(w.max()) if len(w) else 0):
            here = inside & (bit < w[:, None])
            self.bits[(first + bit)[here]] = (values >> bit & 1)[here].to(torch.uint8)
        self.at = self.at + (n * w + 7) // 8 * 8

    def put_numbers(self, numbers: Numbers, where: Tensor) -> None:
        """Rice's code."""
        self.put(numbers.u, numbers.n, numbers.k, where)
        high = numbers.u >> numbers.k[:, None]
        inside = (places(high) < numbers.n[:, None]) & where[:, None]
        ends = ((high + 1) * inside).cumsum(1)
        self.bits[(self.at[:, None] + ends - 1)[inside]] = 1
        self.at = self.at + (ends[:, -1] + 7) // 8 * 8

    def packed(self) -> Tensor:
        """uint8 (bytes)."""
        return (self.bits.view(-1, 8) << places(self.bits, 8).to(torch.uint8)).sum(1, dtype=torch.uint8)


class Reader:
    """Bytes, of which rows are read from the bit `at` (b) on. Beyond the end are zeros."""

    def __init__(self, packed: Tensor, starts: Tensor) -> None:
        self.packed, self.at = packed, 8 * starts

    def _bits(self, at: Tensor) -> Tensor:
        found = self.packed[(at >> 3).clamp(max=self.packed.numel() - 1)].long() >> (at & 7) & 1
        return torch.where(at >> 3 < self.packed.numel(), found, 0)

    def get(self, count: Tensor | int, width: Tensor | int, where: Tensor, columns: int = BLOCK) -> Tensor:
        """What `Writer.put` wrote: (b columns), 0 in other rows."""
        n, w = (torch.as_tensor(v, device=self.at.device).expand_as(self.at) * where for v in (count, width))
        place = places(self.at, columns)
        first, values = self.at[:, None] + place * w[:, None], self.at.new_zeros(len(self.at), columns)
        for bit in range(int(w.max())):
            values += self._bits(first + bit) * ((place < n[:, None]) & (bit < w[:, None])) << bit
        self.at = self.at + (n * w + 7) // 8 * 8
        return values

    def get_numbers(self, n: Tensor, k: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """What `Writer.put_numbers` wrote, and in which rows that was right."""
        n = n * where
        low = self.get(n, k, where)
        ones = self._bits(self.at[:, None] + places(low, HIGH_BITS * BLOCK)) > 0
        ends = in_front(ones)[:, :BLOCK]
        last = torch.where(n > 0, ends.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0] + 1, 0)
        good = (ones.sum(1) >= n) & (last <= (HIGH_BITS * n + 7) // 8 * 8)
        self.at = self.at + (last + 7) // 8 * 8
        high = ends - F.pad(ends[:, :-1], (1, 0), value=-1) - 1
        return torch.where(places(low) < n[:, None], low | high << k[:, None], 0), good
