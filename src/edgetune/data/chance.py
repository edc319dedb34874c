"""Random numbers that depend on what they are for, not on what was drawn before, so resuming is exact."""

from __future__ import annotations

import hashlib

import torch


def generator_for(*keys: int | str) -> torch.Generator:
    """A generator seeded by `keys` alone, such as (seed, epoch, index)."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def permutation(length: int, *keys: int | str) -> list[int]:
    """A shuffle of range(length) that depends on `keys` alone."""
    return torch.randperm(length, generator=generator_for(*keys)).tolist()
