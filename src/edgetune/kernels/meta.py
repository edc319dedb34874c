"""What every kernel returns, without the numbers: runs on meta and fake tensors, and checks the arguments.

The real kernels call these checks too: what is refused in a run is refused on meta tensors already.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgetune.errors import EdgetuneError
from edgetune.kernels.bounded_format import BLOCK, HEADER, broken, chunks_of, unfit_sizes
from edgetune.kernels.geometry import (
    ROWS,
    Groups,
    Pool,
    ceil_div,
    check_bits,
    check_cells,
    count_dtype,
    dense,
    is_channels_last,
    memory_format,
    row_blocks,
)
from edgetune.shapes import expect


def _grid(x: Tensor, cell_h: int, cell_w: int, dtype: torch.dtype) -> Tensor:
    check_cells(x, cell_h, cell_w)
    n, c, h, w = x.shape
    return torch.empty((n, c, ceil_div(h, cell_h), ceil_div(w, cell_w)), dtype=dtype, device=x.device)


def patch_mean(x: Tensor, cell_h: int, cell_w: int, by_channel: bool = False) -> Tensor:
    if not by_channel:
        return _grid(x, cell_h, cell_w, x.dtype)
    check_cells(x, cell_h, cell_w)
    n, c, h, w = x.shape
    grid = ceil_div(h, cell_h), ceil_div(w, cell_w)
    return torch.empty((c, n, *grid), dtype=x.dtype, device=x.device).transpose(0, 1)


def patch_spread(v: Tensor, h: int, w: int, cell_h: int, cell_w: int, channels_last: bool = False) -> Tensor:
    check_cells(v, cell_h, cell_w)
    n, c, p, q = v.shape
    if p != ceil_div(h, cell_h) or q != ceil_div(w, cell_w):
        raise EdgetuneError(f"a {p}x{q} grid doesn't cover {h}x{w} pixels in cells of {cell_h}x{cell_w}: "
                            "give the sizes that patch_mean was called with")
    order = memory_format(channels_last)
    return torch.empty((n, c, h, w), dtype=v.dtype, device=v.device, memory_format=order)


def mask_pack(x: Tensor, low: float, high: float) -> Tensor:
    return torch.empty(((x.numel() + 7) // 8,), dtype=torch.uint8, device=x.device)


def mask_apply(g: Tensor, bits: Tensor) -> Tensor:
    check_bits(bits, g.numel())
    return torch.empty_like(g, memory_format=memory_format(is_channels_last(g)))


def mask_count(x: Tensor, low: float, high: float, cell_h: int, cell_w: int) -> Tensor:
    return _grid(x, cell_h, cell_w, count_dtype(cell_h, cell_w))


def bits_count(bits: Tensor, n: int, c: int, h: int, w: int, cell_h: int, cell_w: int,
               channels_last: bool = False) -> Tensor:
    check_bits(bits, n * c * h * w)
    return _grid(bits.new_empty((1,)).expand(n, c, h, w), cell_h, cell_w, count_dtype(cell_h, cell_w))


def masked_patch_mean(g: Tensor, bits: Tensor, cell_h: int, cell_w: int) -> Tensor:
    check_bits(bits, g.numel())
    return _grid(g, cell_h, cell_w, g.dtype)


def norm_backward(g: Tensor, bits: Tensor | None, x: Tensor | None, weight: Tensor | None, mean: Tensor, var: Tensor,
                  eps: float, wants_input: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gx, gw, gb and a scratch, handed out so that whoever counts memory sees it."""
    n, c, h, w = expect(g, "n c h w")
    if bits is not None:
        check_bits(bits, g.numel())
    if x is not None and x.shape != g.shape:
        expect(x, "n c h w", n=n, c=c, h=h, w=w)
    for values in (weight, mean, var):
        if values is not None and values.shape != (c,):
            expect(values, "c", c=c)
    last = is_channels_last(g)
    gx = torch.empty_like(g, memory_format=memory_format(last)) if wants_input else g.new_empty((0, 0, 0, 0))
    wide = torch.promote_types(g.dtype, torch.float32)
    gw, gb = g.new_empty(0 if x is None else c, dtype=wide), g.new_empty(c, dtype=wide)
    _, blocks = row_blocks(n * h * w) if last else (0, 0)
    return gx, gw, gb, g.new_empty((1 + 2 * blocks, c), dtype=wide)


def grid_products(g: Tensor, to_input: Tensor | None, to_weight: Tensor | None, x: Tensor | None, w: Tensor,
                  groups: int, wants_input: bool, spread: bool) -> tuple[Tensor, Tensor, Tensor]:
    """gx, gw and the sums over taps: a scratch, handed out so that whoever counts memory sees it."""
    n, o, p, q = expect(g, "n o p q")
    expect(w, "o i u v", o=o)
    if o % groups:
        raise EdgetuneError(f"{o} output channels don't divide into {groups} groups: give the layer's own groups")
    c = w.shape[1] * groups
    if x is not None and x.shape != (n, c, p, q):
        expect(x, "n c p q", n=n, c=c, p=p, q=q)
    for factor in (to_input, to_weight):
        if factor is not None and factor.shape != (p, q):
            expect(factor, "p q", p=p, q=q)
    gx = g.new_empty((c, n, p, q) if wants_input else (0, 0, 0, 0)).transpose(0, 1)
    sums = g.new_empty(o * (w.shape[1] + ROWS - 1) if wants_input else 0)
    if x is None:
        return gx, g.new_empty((0, 0)), sums
    if not spread:
        return gx, g.new_empty(w.shape[:2]), sums
    return gx, torch.empty_like(w, dtype=g.dtype, memory_format=memory_format(is_channels_last(w))), sums


def max_pool(x: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
             dil_h: int, dil_w: int, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    pool = Pool(kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w)
    pool.check(x)
    n, c, h, w = x.shape
    p, q = pool.out_size(h, w, ceil_mode)
    y = torch.empty((n, c, p, q), dtype=x.dtype, device=x.device,
                    memory_format=memory_format(is_channels_last(dense(x))))
    return y, torch.empty_like(y, dtype=torch.uint8)


def max_pool_backward(gy: Tensor, index: Tensor, h: int, w: int, kernel_h: int, kernel_w: int, stride_h: int,
                      stride_w: int, pad_h: int, pad_w: int, dil_h: int, dil_w: int) -> Tensor:
    Pool(kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w).check(gy)
    if gy.shape != index.shape or index.dtype != torch.uint8:
        raise EdgetuneError(f"a gradient of shape {tuple(gy.shape)} doesn't belong to an index of shape "
                            f"{tuple(index.shape)} and type {index.dtype}: give the index of max_pool")
    n, c = gy.shape[:2]
    return torch.empty((n, c, h, w), dtype=gy.dtype, device=gy.device,
                       memory_format=memory_format(is_channels_last(index)))


def group_pack(x: Tensor, bits: int, group: int, seed: int, stochastic: bool = True) -> Tensor:
    groups = Groups(bits, group)
    groups.check()
    return torch.empty((groups.size(x.numel()),), dtype=torch.uint8, device=x.device)


def group_unpack(packed: Tensor, bits: int, group: int, elements: int) -> Tensor:
    groups = Groups(bits, group)
    groups.check()
    groups.check_size(packed, elements)
    return torch.empty((elements,), dtype=torch.float32, device=packed.device)


def bounded_sizes(x: Tensor, bound: float) -> Tensor:
    if not (math.isfinite(bound) and bound >= 0):
        raise EdgetuneError(f"an error bound of {bound} bounds nothing: give 0 (exact) or a positive number")
    return torch.empty((chunks_of(x.numel()),), dtype=torch.int32, device=x.device)


def bounded_encode(x: Tensor, sizes: Tensor, bound: float, size: int) -> Tensor:
    expected = bounded_sizes(x, bound)
    if sizes.shape != expected.shape or sizes.dtype != expected.dtype:
        raise EdgetuneError(f"sizes of shape {tuple(sizes.shape)} and type {sizes.dtype} don't belong to {x.numel()} "
                            "values: give those of bounded_sizes")
    if size < HEADER:
        raise unfit_sizes()
    return torch.empty((size,), dtype=torch.uint8, device=x.device)


def bounded_decode(packed: Tensor, count: int) -> Tensor:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise EdgetuneError(f"a tensor of shape {tuple(packed.shape)} and type {packed.dtype} isn't packed: give the "
                            "uint8 tensor that bounded_encode made")
    if count > BLOCK * packed.numel():
        raise broken(f"{packed.numel()} bytes never hold {count} values")
    return torch.empty((count,), dtype=torch.float32, device=packed.device)
