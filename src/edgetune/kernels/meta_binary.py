"""What the convolutions with one bit a weight return, without the numbers; and their checks, as in meta.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgetune.errors import EdgetuneError
from edgetune.kernels.binary_format import (
    BinaryLayer,
    check_groups,
    check_per_channel,
    check_residual,
    check_signs,
    checked_layer,
    out_shape,
    words_of,
)


def sign_pack(x: Tensor) -> Tensor:
    if x.dim() != 4 or not x.is_floating_point():
        raise EdgetuneError(f"a tensor of shape {tuple(x.shape)} and type {x.dtype} has no signs by pixel: give floats "
                            "with axes (n c h w)")
    n, c, h, w = x.shape
    return _signs(x, (n, c, h, w))


def sign_unpack(bits: Tensor, channels: int) -> Tensor:
    n, h, w = check_signs(bits, channels)
    return _map(bits, n, channels, h, w)


def arrange_filters(bits: Tensor, channels: int, groups: int = 1) -> Tensor:
    check_groups(channels, groups)
    check_signs(bits, channels // groups)
    o, u, v, _ = bits.shape
    layer = BinaryLayer(channels, o, u, v, groups=groups)
    layer.check()
    return torch.empty(layer.filter_shape(), dtype=torch.int64, device=bits.device)


def binary_conv(bits: Tensor, filters: Tensor, scale: Tensor | None, layer: Sequence[int]) -> Tensor:
    return _map(bits, *_out_shape(bits, filters, scale, layer))


def binary_conv_clip(bits: Tensor, filters: Tensor, scale: Tensor | None, gain: Tensor | None, shift: Tensor | None,
                     residual: Tensor | None, low: float, high: float, whole: bool, signs: bool,
                     layer: Sequence[int]) -> tuple[Tensor, Tensor]:
    return _clipped(bits, _out_shape(bits, filters, scale, layer), gain, shift, residual, whole, signs)


def _out_shape(bits: Tensor, filters: Tensor, scale: Tensor | None, layer: Sequence[int]) -> tuple[int, int, int, int]:
    shape = out_shape(checked_layer(tuple(layer)), bits, filters)
    if scale is not None:
        check_per_channel("scale", scale, torch.float32, shape[1])
    return shape


def binary_conv_sign(bits: Tensor, filters: Tensor, threshold: Tensor, flip: Tensor | None,
                     layer: Sequence[int]) -> Tensor:
    shape = out_shape(checked_layer(tuple(layer)), bits, filters)
    check_per_channel("threshold", threshold, torch.int32, shape[1])
    if flip is not None:
        check_per_channel("flip", flip, torch.bool, shape[1])
    return _signs(bits, shape)


def affine_clip(x: Tensor, gain: Tensor | None, shift: Tensor | None, residual: Tensor | None, low: float, high: float,
                whole: bool, signs: bool) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.float32 or x.dim() != 4:
        raise EdgetuneError(f"a tensor of shape {tuple(x.shape)} and type {x.dtype} isn't a map: give "
                            "float32 (n c h w)")
    n, c, h, w = x.shape
    return _clipped(x, (n, c, h, w), gain, shift, residual, whole, signs)


def _clipped(like: Tensor, shape: tuple[int, int, int, int], gain: Tensor | None, shift: Tensor | None,
             residual: Tensor | None, whole: bool, signs: bool) -> tuple[Tensor, Tensor]:
    """What `affine_clip` makes of a map of that shape."""
    if (gain is None) != (shift is None):
        raise EdgetuneError("a gain without a shift, or the other way round: give both or neither")
    if not whole and not signs:
        raise EdgetuneError("neither values nor bits are wanted: ask for one of them")
    for name, factor in (("gain", gain), ("shift", shift)):
        if factor is not None:
            check_per_channel(name, factor, torch.float32, shape[1])
    if residual is not None:
        check_residual(residual, shape)
    none = 0, 0, 0, 0
    return _map(like, *(shape if whole else none)), _signs(like, shape if signs else none)


def bit_weight_conv(x: Tensor, filters: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
                    layer: Sequence[int]) -> Tensor:
    which = checked_layer(tuple(layer))
    if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[1] != which.channels:
        raise EdgetuneError(f"a map of shape {tuple(x.shape)} and type {x.dtype} isn't the input of {which}: give "
                            f"uint8 (n {which.channels} h w)")
    if not 0 <= which.pad_value <= 255:
        raise EdgetuneError(f"a border of {which.pad_value} isn't a byte: give pad_value 0 to 255")
    if which.products * 255 >= 2**31:
        raise EdgetuneError(f"a sum of {which.products} bytes doesn't fit int32: give less than {2**31 // 255} of them")
    which.check_filters(filters)
    shape = (x.shape[0], which.out_channels, *which.out_size(*x.shape[2:]))
    _check_affine(scale, shift, residual, shape)
    whole = scale is None and shift is None and residual is None
    return _map(x, *shape, dtype=torch.int32 if whole else torch.float32)


def _check_affine(scale: Tensor | None, shift: Tensor | None, residual: Tensor | None, shape: tuple[int, ...]) -> None:
    if scale is not None:
        check_per_channel("scale", scale, torch.float32, shape[1])
    if shift is not None:
        check_per_channel("shift", shift, torch.float32, shape[1])
    if residual is not None:
        check_residual(residual, shape)


def _map(like: Tensor, n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty((n, c, h, w), dtype=dtype, device=like.device, memory_format=torch.channels_last)


def _signs(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    n, c, h, w = shape
    return torch.empty((n, h, w, words_of(c)), dtype=torch.int64, device=like.device)
