"""Kernels: one schema an op, native code compiled on first use, a plain-torch fallback always there."""

from __future__ import annotations

from edgetune.kernels.binary_format import BinaryLayer
from edgetune.kernels.build import Status, status
from edgetune.kernels.filters import binary_filters, dense_bits, plain_bits, sign_thresholds
from edgetune.kernels.geometry import is_channels_last
from edgetune.kernels.ops import (
    NAMES,
    arrange_filters,
    binary_conv,
    binary_conv_both,
    binary_conv_sign,
    bit_weight_conv,
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
    sign_pack,
    sign_unpack,
)
from edgetune.kernels.ops_adder import (
    adder_conv,
    adder_conv_input_gradient,
    adder_conv_u8,
    adder_conv_u8_scaled,
    adder_filters,
)

__all__ = [
    "BinaryLayer",
    "Status",
    "NAMES",
    "arrange_filters",
    "binary_conv",
    "binary_conv_both",
    "binary_conv_sign",
    "binary_filters",
    "bit_weight_conv",
    "adder_conv",
    "adder_conv_input_gradient",
    "adder_conv_u8",
    "adder_conv_u8_scaled",
    "adder_filters",
    "bits_count",
    "bounded_decode",
    "bounded_encode",
    "bounded_sizes",
    "dense_bits",
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
    "plain_bits",
    "sign_pack",
    "sign_thresholds",
    "sign_unpack",
    "status",
]
