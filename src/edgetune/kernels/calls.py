"""The C functions: what they take, and each looked up once."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from edgetune.kernels import build

P, N, B, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float

# Argument types of every C function, without its last one, the number of threads.
ARGUMENTS: dict[str, tuple[type, ...]] = {
    "patch_mean": (P, P, N, N, N, N, N, N, B, B),
    "patch_spread": (P, P, N, N, N, N, N, N, B, B),
    "mask_pack": (P, P, F, F, N),
    "mask_apply": (P, P, P, N),
    "mask_count": (P, P, F, F, N, N, N, N, N, N, B),
    "bits_count": (P, P, N, N, N, N, N, N, B),
    "masked_patch_mean": (P, P, P, N, N, N, N, N, N, B),
    "norm_backward": (P, P, P, P, P, P, P, P, P, P, N, N, N, N, N, F),
    "grid_products": (P, P, P, P, P, P, P, P, P),
    "group_pack": (P, P, N, B, N, N, B),
    "group_unpack": (P, P, N, B, N),
    "max_pool": (P, P, P, P, B),
    "max_pool_backward": (P, P, P, P, B),
    "bounded_sizes": (P, P, N, F, F),
    "bounded_encode": (P, P, P, P, N, F, F),
    "bounded_decode": (P, N, P, P, P, N, F),
    "sign_pack": (P, P, N, N, N, B),
    "sign_unpack": (P, P, N, N),
    "arrange_filters": (P, P, N, N, N, N, N),
    "binary_conv": (P, P, P, P, P, P, P, P, P, P, P, P, F, F),
    "bit_weight_conv": (P, P, P, P, P, P, P, P, P),
    "affine_clip": (P, P, P, P, F, F, P, P, N, N),
    "adder_conv": (P, P, P, P, P),
    "adder_conv_input_gradient": (P, P, P, P, P, P),
    "adder_conv_u8": (P, P, P, P, P),
    "adder_conv_steps": (P, P, P, P, P, P, P, P, P),
}
SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}

_functions: dict[tuple[str, torch.dtype], Callable[..., None] | None] = {}


def function(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The C function for this type, or None; looked up once."""
    key = name, dtype
    if key not in _functions:
        found = getattr(build.library(), f"et_{name}_{SUFFIX.get(dtype)}", None) if dtype in SUFFIX else None
        if found is not None:
            found.argtypes, found.restype = (*ARGUMENTS[name], B), None
        _functions[key] = found
    return _functions[key]
