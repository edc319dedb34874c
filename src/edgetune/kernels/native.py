"""The native versions: each fills the outputs it is given and returns True, or returns False to decline.

Declined are types other than float32 and bfloat16 (the fallback takes any), and everything where no library
is built. Tensors of another layout are copied to a dense one first. All offsets in C are 64 bits wide.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, get_num_threads

from edgetune.kernels.bounded_format import bound_of, broken, chunks_of, head_of, starts_of, steps_of, unfit_sizes
from edgetune.kernels.calls import N, function
from edgetune.kernels.geometry import is_channels_last, memory_format, row_blocks

COUNTABLE = 2**24  # pixels of a cell: float32 counts stay exact below


def _walked(x: Tensor) -> tuple[Tensor, bool]:
    """A dense tensor, and whether it lies channels last."""
    if x.is_contiguous():
        return x, False
    if is_channels_last(x):
        return x, True
    return x.contiguous(), False


def patch_mean(out: Tensor, x: Tensor, cell_h: int, cell_w: int, by_channel: bool = False) -> bool:
    run = function("patch_mean", x.dtype)
    if run is None:
        return False
    x, last = _walked(x)
    run(x.data_ptr(), out.data_ptr(), *x.shape, cell_h, cell_w, last, by_channel, get_num_threads())
    return True


def patch_spread(out: Tensor, v: Tensor, h: int, w: int, cell_h: int, cell_w: int,
                 channels_last: bool = False) -> bool:
    run = function("patch_spread", v.dtype)
    if run is None:
        return False
    by_channel = not v.is_contiguous() and v.transpose(0, 1).is_contiguous()
    v = v if by_channel else v.contiguous()
    run(v.data_ptr(), out.data_ptr(), *out.shape, cell_h, cell_w, channels_last, by_channel, get_num_threads())
    return True


def mask_pack(out: Tensor, x: Tensor, low: float, high: float) -> bool:
    run = function("mask_pack", x.dtype)
    if run is None:
        return False
    x, _ = _walked(x)
    run(x.data_ptr(), out.data_ptr(), low, high, x.numel(), get_num_threads())
    return True


def mask_apply(out: Tensor, g: Tensor, bits: Tensor) -> bool:
    run = function("mask_apply", g.dtype)
    if run is None:
        return False
    g, _ = _walked(g)
    bits = bits.contiguous()
    run(g.data_ptr(), bits.data_ptr(), out.data_ptr(), g.numel(), get_num_threads())
    return True


def mask_count(out: Tensor, x: Tensor, low: float, high: float, cell_h: int, cell_w: int) -> bool:
    run = function("mask_count", x.dtype)
    if run is None or cell_h * cell_w >= COUNTABLE:
        return False
    x, last = _walked(x)
    run(x.data_ptr(), out.data_ptr(), low, high, *x.shape, cell_h, cell_w, last, get_num_threads())
    return True


def bits_count(out: Tensor, bits: Tensor, n: int, c: int, h: int, w: int, cell_h: int, cell_w: int,
               channels_last: bool = False) -> bool:
    run = function("bits_count", torch.float32)
    if run is None or cell_h * cell_w >= COUNTABLE:
        return False
    bits = bits.contiguous()
    run(bits.data_ptr(), out.data_ptr(), n, c, h, w, cell_h, cell_w, channels_last, get_num_threads())
    return True


def masked_patch_mean(out: Tensor, g: Tensor, bits: Tensor, cell_h: int, cell_w: int) -> bool:
    run = function("masked_patch_mean", g.dtype)
    if run is None:
        return False
    g, last = _walked(g)
    bits = bits.contiguous()
    run(g.data_ptr(), bits.data_ptr(), out.data_ptr(), *g.shape, cell_h, cell_w, last, get_num_threads())
    return True


def norm_backward(out: tuple[Tensor, Tensor, Tensor, Tensor], g: Tensor, bits: Tensor | None, x: Tensor | None,
                  weight: Tensor | None, mean: Tensor, var: Tensor, eps: float, wants_input: bool) -> bool:
    run = function("norm_backward", g.dtype)
    if run is None or g.numel() == 0 or (x is not None and x.dtype != g.dtype):
        return False
    if not mean.dtype == var.dtype == (mean if weight is None else weight).dtype == torch.float32:
        return False
    g, last = _walked(g)
    x = None if x is None else x.contiguous(memory_format=memory_format(last))
    bits, weight, mean, var = _dense(bits), _dense(weight), mean.contiguous(), var.contiguous()
    gx, gw, gb, scratch = out
    n, c, h, w = g.shape
    run(g.data_ptr(), _at(bits), _at(x), _at(weight), mean.data_ptr(), var.data_ptr(),
        gx.data_ptr() if wants_input else None, gw.data_ptr(), gb.data_ptr(), scratch.data_ptr(), n, c, h * w,
        *(row_blocks(n * h * w) if last else (0, 0)), eps, get_num_threads())
    return True


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def grid_products(out: tuple[Tensor, Tensor, Tensor], g: Tensor, to_input: Tensor | None, to_weight: Tensor | None,
                  x: Tensor | None, w: Tensor, groups: int, wants_input: bool, spread: bool) -> bool:
    run = function("grid_products", g.dtype)
    if run is None or g.numel() == 0 or {t.dtype for t in (g, to_input, to_weight, x, w) if t is not None} != {g.dtype}:
        return False
    gx, gw, sums = out
    (o, i, ku, kv), (n, _, p, q) = w.shape, g.shape
    w, last = _walked(w)
    # held until the call is over: the pointers are all that it gets
    dense = [_by_channel(g), _dense(to_input), _dense(to_weight), None if x is None else _by_channel(x), w,
             gx if wants_input else None, None if x is None else gw, sums]
    taps, copies = ku * kv, ku * kv if spread else 1
    sizes = (N * 13)(groups, o // groups, i, n * p * q, p * q, taps, *_strides(last, i, taps),
                     *_strides(last and spread, i, copies), copies)
    run(*[None if t is None else t.data_ptr() for t in dense], ctypes.addressof(sizes), get_num_threads())
    return True


def _by_channel(t: Tensor) -> Tensor:
    """(n c p q) -> (c n p q), dense."""
    return t.transpose(0, 1).contiguous()


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _strides(last: bool, i: int, taps: int) -> tuple[int, int, int]:
    """Elements from one output channel, input channel and tap of a weight (channels last or not) to the next."""
    return (i * taps, 1, i) if last else (i * taps, taps, 1)


def group_pack(out: Tensor, x: Tensor, bits: int, group: int, seed: int, stochastic: bool = True) -> bool:
    run = function("group_pack", x.dtype)
    if run is None:
        return False
    x, _ = _walked(x)
    run(x.data_ptr(), out.data_ptr(), x.numel(), bits, group, seed, stochastic, get_num_threads())
    return True


def group_unpack(out: Tensor, packed: Tensor, bits: int, group: int, elements: int) -> bool:
    run = function("group_unpack", torch.float32)
    if run is None:
        return False
    packed = packed.contiguous()
    run(packed.data_ptr(), out.data_ptr(), elements, bits, group, get_num_threads())
    return True


def max_pool(out: tuple[Tensor, Tensor], x: Tensor, *geometry: int) -> bool:
    run = function("max_pool", x.dtype)
    if run is None:
        return False
    x, last = _walked(x)
    y, index = out
    sizes = (N * 14)(*x.shape, *y.shape[2:], *geometry[:8])
    run(x.data_ptr(), y.data_ptr(), index.data_ptr(), ctypes.addressof(sizes), last, get_num_threads())
    return True


def max_pool_backward(out: Tensor, gy: Tensor, index: Tensor, h: int, w: int, *geometry: int) -> bool:
    run = function("max_pool_backward", gy.dtype)
    if run is None:
        return False
    index, last = _walked(index)
    gy = gy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    sizes = (N * 14)(*out.shape, *gy.shape[2:], *geometry)
    run(gy.data_ptr(), index.data_ptr(), out.data_ptr(), ctypes.addressof(sizes), last, get_num_threads())
    return True


def bounded_sizes(out: Tensor, x: Tensor, bound: float) -> bool:
    run = function("bounded_sizes", x.dtype)
    if run is None:
        return False
    x = x.contiguous()
    run(x.data_ptr(), out.data_ptr(), x.numel(), *steps_of(bound), get_num_threads())
    return True


def bounded_encode(out: Tensor, x: Tensor, sizes: Tensor, bound: float, size: int) -> bool:
    run = function("bounded_encode", x.dtype)
    starts, unfit = starts_of(sizes), N()
    if run is None:
        return False
    if starts[-1] != size or bool((sizes < 0).any()):
        raise unfit_sizes()
    x, head = x.contiguous(), head_of(x.numel(), bound, size)
    out[: head.numel()] = head
    run(x.data_ptr(), out.data_ptr(), starts.data_ptr(), ctypes.addressof(unfit), x.numel(), *steps_of(bound),
        get_num_threads())
    if unfit.value:
        raise unfit_sizes()
    return True


def bounded_decode(out: Tensor, packed: Tensor, count: int) -> bool:
    run = function("bounded_decode", out.dtype)
    if run is None:
        return False
    packed, e = packed.contiguous(), steps_of(bound_of(packed, count)).e
    chunks, damaged = chunks_of(count), N()
    starts = torch.empty(chunks + 1, dtype=torch.int64)
    run(packed.data_ptr(), packed.numel(), out.data_ptr(), starts.data_ptr(), ctypes.addressof(damaged), count, e,
        get_num_threads())
    if damaged.value:
        raise broken("their table of chunks is damaged" if damaged.value < 0 else
                     f"{damaged.value} of {chunks} chunks are damaged")
    return True
