"""Every op once: its schema in the `edgetune` namespace, its meta version, its fallback, its native version.

On CPU a call goes to the native code where that is built and takes the tensors' type and layout, else to the
fallback; on every other device to the fallback. All versions check their arguments by the same meta version.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from edgetune.kernels import (
    fallback,
    fallback_adder,
    fallback_binary,
    meta,
    meta_adder,
    meta_binary,
    native,
    native_adder,
    native_binary,
)

Kernel = Callable[..., Any]


class Op(NamedTuple):
    """One op: arguments as in torch.library, the meta version, the fallback, and the native version.

    `native(outputs, *arguments)` fills what the meta version allocated and returns True, or returns False
    where it doesn't take these tensors.
    """

    signature: str
    meta: Kernel
    fallback: Kernel
    native: Kernel


_POOL = "int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dil_h, int dil_w"
_AFFINE = "Tensor? scale, Tensor? shift, Tensor? residual"
_CLIP = "Tensor? gain, Tensor? shift, Tensor? residual, float low, float high, bool whole, bool signs"

_WINDOWS = "int[] stride, int[] pads, int[] dilation, int groups"


def _ops(metas: ModuleType, fallbacks: ModuleType, natives: ModuleType, signatures: dict[str, str]) -> dict[str, Op]:
    """Ops whose versions stand under their names in three modules."""
    return {name: Op(signature, *(getattr(versions, name) for versions in (metas, fallbacks, natives)))
            for name, signature in signatures.items()}


OPS = _ops(meta, fallback, native, {
    "patch_mean": "(Tensor x, int cell_h, int cell_w, bool by_channel=False) -> Tensor",
    "patch_spread": "(Tensor v, SymInt h, SymInt w, int cell_h, int cell_w, bool channels_last=False) "
                    "-> Tensor",
    "mask_pack": "(Tensor x, float low, float high) -> Tensor",
    "mask_apply": "(Tensor g, Tensor bits) -> Tensor",
    "mask_count": "(Tensor x, float low, float high, int cell_h, int cell_w) -> Tensor",
    "bits_count": "(Tensor bits, SymInt n, SymInt c, SymInt h, SymInt w, int cell_h, int cell_w, "
                  "bool channels_last=False) -> Tensor",
    "masked_patch_mean": "(Tensor g, Tensor bits, int cell_h, int cell_w) -> Tensor",
    "norm_backward": "(Tensor g, Tensor? bits, Tensor? x, Tensor? weight, Tensor mean, Tensor var, float eps, "
                     "bool wants_input) -> (Tensor, Tensor, Tensor, Tensor)",
    "grid_products": "(Tensor g, Tensor? to_input, Tensor? to_weight, Tensor? x, Tensor w, SymInt groups, "
                     "bool wants_input, bool spread) -> (Tensor, Tensor, Tensor)",
    "group_pack": "(Tensor x, int bits, int group, int seed, bool stochastic=True) -> Tensor",
    "group_unpack": "(Tensor packed, int bits, int group, SymInt elements) -> Tensor",
    "max_pool": f"(Tensor x, {_POOL}, bool ceil_mode) -> (Tensor, Tensor)",
    "max_pool_backward": f"(Tensor gy, Tensor index, SymInt h, SymInt w, {_POOL}) -> Tensor",
    "bounded_sizes": "(Tensor x, float bound) -> Tensor",
    "bounded_encode": "(Tensor x, Tensor sizes, float bound, SymInt size) -> Tensor",
    "bounded_decode": "(Tensor packed, SymInt count) -> Tensor",
})
OPS |= _ops(meta_binary, fallback_binary, native_binary, {
    "sign_pack": "(Tensor x) -> Tensor",
    "sign_unpack": "(Tensor bits, int channels) -> Tensor",
    "arrange_filters": "(Tensor bits, int channels, int groups=1) -> Tensor",
    "binary_conv": "(Tensor bits, Tensor filters, Tensor? scale, int[] layer) -> Tensor",
    "binary_conv_clip": f"(Tensor bits, Tensor filters, Tensor? scale, {_CLIP}, int[] layer) -> (Tensor, Tensor)",
    "binary_conv_sign": "(Tensor bits, Tensor filters, Tensor threshold, Tensor? flip, int[] layer) -> Tensor",
    "affine_clip": f"(Tensor x, {_CLIP}) -> (Tensor, Tensor)",
    "bit_weight_conv": f"(Tensor x, Tensor filters, {_AFFINE}, int[] layer) -> Tensor",
})
OPS |= _ops(meta_adder, fallback_adder, native_adder, {
    "adder_conv": f"(Tensor x, Tensor weight, {_WINDOWS}) -> Tensor",
    "adder_conv_input_gradient": f"(Tensor gy, Tensor x, Tensor weight, {_WINDOWS}) -> Tensor",
    "adder_filters": "(Tensor weight, int groups) -> Tensor",
    "adder_conv_u8": f"(Tensor x, Tensor filters, int out_channels, int[] kernel, {_WINDOWS}, int pad_value) "
                     "-> Tensor",
    "adder_conv_steps": "(Tensor x, Tensor filters, Tensor members, Tensor step, Tensor shift, int[] sizes, int top, "
                        "bool exact, int[] kernel, int[] stride, int[] pads, int[] dilation) -> Tensor",
})


def _checked(op: Op) -> Kernel:
    check, plain = op.meta, op.fallback

    def run(*arguments: Any) -> Any:
        check(*arguments)
        return plain(*arguments)

    return run


def _on_cpu(op: Op) -> Kernel:
    allocate, fill, plain = op.meta, op.native, op.fallback

    def run(*arguments: Any) -> Any:
        out = allocate(*arguments)
        if fill(out, *arguments):
            return out
        del out
        return plain(*arguments)

    return run


library = torch.library.Library("edgetune", "DEF")
for _name, _op in OPS.items():
    library.define(_name + _op.signature, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, _on_cpu(_op), "CPU")
    library.impl(_name, _checked(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"edgetune::{_name}", _op.meta, lib=library)
