"""What group_pack draws, in plain torch: 16 bits an element, a hash of (seed, group, place in the group)."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 2**32 - 1


def _right(z: Tensor, by: int) -> Tensor:
    """Shifts 64 bits as if they had no sign."""
    return (z >> by) & (2 ** (64 - by) - 1)


def _signed(a: int) -> int:
    """The int64 of the same 64 bits."""
    return a - 2**64 if a >= 2**63 else a


def _keys(seed: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two words (groups 1): the finaliser of splitmix64 (Steele, Lea, Flood, 2014) on seed + (group+1)*2^64/phi."""
    z = seed + torch.arange(1, groups + 1, device=device)[:, None] * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _right(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _right(z, 31)
    return z & WORD, _right(z, 32)


def draw(seed: int, groups: int, group: int, device: torch.device) -> Tensor:
    """Even numbers of 0..65535, int64 (groups group). Two elements, 8 places apart, share the halves of a hash.

    The hash is a finaliser of two products (constants: C. Wellons, hash-prospector), keyed twice.
    """
    first, second = _keys(seed, groups, device)
    place = torch.arange(group, device=device)
    z = (place // 16 * 8 + place % 8) ^ first
    z = (z ^ z >> 16) * 0x21F0AAAD & WORD
    z = (z ^ z >> 15) + second & WORD
    z = z * 0xD35A2D97 & WORD
    return (z ^ z >> 15) >> place // 8 % 2 * 16 & 0xFFFF
