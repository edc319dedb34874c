"""The native versions of the convolutions with one bit a weight, as in native.py."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, get_num_threads

from edgetune.kernels.binary_format import AT_ONCE, BinaryLayer
from edgetune.kernels.calls import N, function

_LAST = torch.channels_last
PLANS = 1024  # remembered shapes


def sign_pack(out: Tensor, x: Tensor) -> bool:
    run = function("sign_pack", x.dtype)
    if run is None:
        return False
    last = x.is_contiguous(memory_format=_LAST)
    x = x if last else x.contiguous()
    n, c, h, w = x.shape
    run(x.data_ptr(), out.data_ptr(), n, c, h * w, last, get_num_threads())
    return True


def sign_unpack(out: Tensor, bits: Tensor, channels: int) -> bool:
    run = function("sign_unpack", torch.float32)
    if run is None:
        return False
    bits = bits.contiguous()
    n, h, w, _ = bits.shape
    run(bits.data_ptr(), out.data_ptr(), n * h * w, channels, get_num_threads())
    return True


def arrange_filters(out: Tensor, bits: Tensor, channels: int, groups: int = 1) -> bool:
    run = function("arrange_filters", torch.float32)
    if run is None:
        return False
    bits = bits.contiguous()
    o, u, v, words = bits.shape
    run(bits.data_ptr(), out.data_ptr(), o, groups, u * v, words, out.shape[4] if out.dim() == 6 else 0,
        get_num_threads())
    return True


def binary_conv(out: Tensor, bits: Tensor, filters: Tensor, scale: Tensor | None, layer: Sequence[int]) -> bool:
    return _binary((out, None), (scale, None, None, None, None, None), bits, filters, layer)


def binary_conv_clip(out: tuple[Tensor, Tensor], bits: Tensor, filters: Tensor, scale: Tensor | None,
                     gain: Tensor | None, shift: Tensor | None, residual: Tensor | None, low: float, high: float,
                     whole: bool, signs: bool, layer: Sequence[int]) -> bool:
    wanted = out[0] if whole else None, out[1] if signs else None
    return _binary(wanted, (scale, gain, shift, residual, None, None), bits, filters, layer, low, high)


def binary_conv_sign(out: Tensor, bits: Tensor, filters: Tensor, threshold: Tensor, flip: Tensor | None,
                     layer: Sequence[int]) -> bool:
    return _binary((None, out), (None, None, None, None, threshold, flip), bits, filters, layer)


def _binary(out: tuple[Tensor | None, Tensor | None], factors: tuple[Tensor | None, ...], bits: Tensor,
            filters: Tensor, layer: Sequence[int], low: float = -math.inf, high: float = math.inf) -> bool:
    """`factors`: scale, gain, shift, residual, threshold, flip."""
    run = function("binary_conv", torch.float32)
    if run is None:
        return False
    n, h, w, _ = bits.shape
    if n == 0 or filters.numel() == 0:
        return True
    sizes, room = _bits_plan(n, h, w, tuple(layer))
    # held until the call is over: the pointers are all that it gets
    dense = [bits.contiguous(), filters.contiguous(), *[None if t is None else _dense(t) for t in factors], *out,
             torch.empty(room, dtype=torch.uint8)]
    run(*[None if t is None else t.data_ptr() for t in dense], ctypes.addressof(sizes), low, high, get_num_threads())
    return True


def affine_clip(out: tuple[Tensor, Tensor], x: Tensor, gain: Tensor | None, shift: Tensor | None,
                residual: Tensor | None, low: float, high: float, whole: bool, signs: bool) -> bool:
    run = function("affine_clip", x.dtype)
    if run is None:
        return False
    if x.numel() == 0:
        return True
    n, c, h, w = x.shape
    dense, (y, bits) = [None if t is None else _dense(t) for t in (x, gain, shift, residual)], out
    run(*[None if t is None else t.data_ptr() for t in dense], low, high, y.data_ptr() if whole else None,
        bits.data_ptr() if signs else None, n * h * w, c, get_num_threads())
    return True


def bit_weight_conv(out: Tensor, x: Tensor, filters: Tensor, scale: Tensor | None, shift: Tensor | None,
                    residual: Tensor | None, layer: Sequence[int]) -> bool:
    run = function("bit_weight_conv", torch.float32)
    if run is None:
        return False
    if out.numel() == 0:
        return True
    n, _, h, w = x.shape
    sizes, room = _bytes_plan(n, h, w, tuple(layer))
    outs = (None, out) if out.dtype == torch.int32 else (out, None)
    factors = [None if t is None else _dense(t) for t in (scale, shift, residual)]
    dense = [x.contiguous(memory_format=_LAST), filters.contiguous(), *factors, *outs,
             torch.empty(room, dtype=torch.uint8)]
    run(*[None if t is None else t.data_ptr() for t in dense], ctypes.addressof(sizes), get_num_threads())
    return True


Plan = tuple["ctypes.Array[ctypes.c_int64]", int]
"""The numbers that a C function takes, and the bytes of its scratch."""


@lru_cache(PLANS)
def _bits_plan(n: int, h: int, w: int, numbers: tuple[int, ...]) -> Plan:
    layer = BinaryLayer(*numbers)
    rows, columns = layer.padded(h, w, 2)
    nibbles = 2 * layer.bytes_of_tap * layer.groups
    return _plan(n, h, w, layer, rows * nibbles * (3 * columns + layer.stride_w))


@lru_cache(PLANS)
def _bytes_plan(n: int, h: int, w: int, numbers: tuple[int, ...]) -> Plan:
    layer = BinaryLayer(*numbers)
    rows, columns = layer.padded(h, w, 1)
    return _plan(n, h, w, layer, rows * columns * layer.groups * layer.bytes_of_tap * 8)


def _plan(n: int, h: int, w: int, layer: BinaryLayer, each: int) -> Plan:
    """`each`: bytes of scratch of a sample; as many of them are made ready at once as fit AT_ONCE."""
    each = 0 if layer.is_depthwise else each
    at_once = min(n, max(1, AT_ONCE // max(1, each)))
    numbers = (n, h, w, *layer.out_size(h, w), *layer, at_once)
    return (N * len(numbers))(*numbers), at_once * each


def _dense(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=_LAST) if t.dim() == 4 else t.contiguous()
