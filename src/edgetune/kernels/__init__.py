"""Kernels: one schema an op, native code compiled on first use, a plain-torch fallback always there."""

from __future__ import annotations

from edgetune.kernels.build import Status, status
from edgetune.kernels.geometry import is_channels_last
from edgetune.kernels.ops import (
    NAMES,
    bits_count,
    bounded_decode,
    bounded_encode,
    bounded_sizes,
    grid_products,
    group_pack,
    group_unpack,
    mask_apply,
    mask_count,
    mask_pack,
    masked_patch_mean,
    max_pool,
    max_pool_backward,
    patch_mean,
    patch_spread,
)

__all__ = [
    "Status",
    "NAMES",
    "bits_count",
    "bounded_decode",
    "bounded_encode",
    "bounded_sizes",
    "grid_products",
    "group_pack",
    "group_unpack",
    "is_channels_last",
    "mask_apply",
    "mask_count",
    "mask_pack",
    "masked_patch_mean",
    "max_pool",
    "max_pool_backward",
    "patch_mean",
    "patch_spread",
    "status",
]
