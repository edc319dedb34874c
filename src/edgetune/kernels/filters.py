"""Filters with one bit a weight: made ready for the convolutions, stored, and the thresholds of what follows them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgetune.kernels.binary_format import EXACT
from edgetune.kernels.ops import arrange_filters, mask_apply, mask_pack, sign_pack, sign_unpack
from edgetune.shapes import expect

ALWAYS, NEVER = -(2**31), 2**31 - 1
"""Thresholds that every sum reaches, and that none does."""


def binary_filters(weight: Tensor, groups: int = 1) -> Tensor:
    """The signs of a layer's weight (o i u v), arranged as the convolutions read them; sign(0) is +1."""
    return arrange_filters(sign_pack(weight), weight.shape[1] * groups, groups)


def dense_bits(bits: Tensor, channels: int) -> Tensor:
    """Plain bits of filters with `channels` channels, one after the other, for files: uint8 (ceil(o u v i / 8),)."""
    return mask_pack(sign_unpack(bits, channels), 0.0, math.inf)


def plain_bits(dense: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The other way: what dense_bits made of filters of shape (o i u v) -> int64 (o u v words)."""
    ones = torch.ones(shape, device=dense.device).contiguous(memory_format=torch.channels_last)
    return sign_pack(mask_apply(ones, dense) - 0.5)


def sign_thresholds(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """For which sums scale*sum + shift, float32 (o) each, is at least 0: threshold int32 (o), flip bool (o).

    Exactly so, without rounding: where sum >= threshold, or, with flip, where not. Never where one of them is NaN or
    the scale is infinite.
    """
    expect(scale, "o")
    expect(shift, "o", o=scale.shape[0])
    a, b = scale.double(), shift.double()
    flip = a < 0
    below = (-b / a).nan_to_num(0.0, math.inf, -math.inf).clamp(-EXACT, EXACT).floor() - 1
    sums = below[:, None] + torch.arange(4, device=a.device)
    reached = (a[:, None] * sums + b[:, None] >= 0) ^ flip[:, None]  # a*sum is exact, so the sign is right
    threshold = below + (~reached).sum(1)
    constant = (a == 0) | ~a.isfinite() | ~b.isfinite()
    always = a.isfinite() & ((b == math.inf) | ((a == 0) & (b >= 0)))
    threshold = torch.where(constant, torch.where(always, ALWAYS, NEVER).double(), threshold)
    return threshold.to(torch.int32), flip & ~constant
