"""Shapes and memory orders that the kernels, their fallbacks and their meta versions agree on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from edgetune.errors import EdgetuneError


def ceil_div(a: int, b: int) -> int:
    """Integers only: the smallest q with q*b >= a."""
    return (a + b - 1) // b


def is_channels_last(x: Tensor) -> bool:
    """True if a kernel will walk `x` in (n h w c) order: x (n c h w) is dense that way, and not contiguous.

    Anything else is walked in (n c h w) order, after a copy where it isn't dense (an expanded gradient, say).
    """
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """`x` itself where it is contiguous or channels_last, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def check_cells(x: Tensor, cell_h: int, cell_w: int) -> None:
    """Raises EdgetuneError unless x has axes (n c h w) and the cell is at least one pixel."""
    if x.dim() != 4:
        raise EdgetuneError(f"a tensor of shape {tuple(x.shape)} has no patch grid: give axes (n c h w)")
    if cell_h < 1 or cell_w < 1:
        raise EdgetuneError(f"a cell of {cell_h}x{cell_w} pixels is empty: give at least 1x1")


def check_bits(bits: Tensor, elements: int) -> None:
    """Raises EdgetuneError unless `bits` is the packed mask of `elements` elements."""
    if bits.dtype != torch.uint8 or bits.dim() != 1 or bits.shape[0] != (elements + 7) // 8:
        raise EdgetuneError(f"a packed mask of shape {tuple(bits.shape)} and type {bits.dtype} doesn't "
                            f"belong to {elements} elements: give the uint8 tensor that mask_pack made")


def row_blocks(rows: int) -> tuple[int, int]:
    """Rows of each block whose sums are made by themselves, whoever makes them, and how many blocks that is."""
    each = max(LEAST_ROWS, ceil_div(rows, MOST_BLOCKS))
    return each, ceil_div(rows, each)


def count_dtype(cell_h: int, cell_w: int) -> torch.dtype:
    """The narrowest type that holds a count of a cell's pixels."""
    return torch.uint8 if cell_h * cell_w <= 255 else torch.int32


class Groups(NamedTuple):
    """How group_pack lays out its bytes: scales of 6 bytes a group, then codes in tiles of 8 bytes."""

    bits: int
    group: int

    def check(self) -> None:
        """Raises EdgetuneError where there is no such code, or a group isn't a whole number of blocks."""
        if self.bits not in (2, 4, 8):
            raise EdgetuneError(f"codes of {self.bits} bits can't be packed: give 8, 4 or 2")
        if not BLOCK <= self.group <= MOST or self.group % BLOCK:
            raise EdgetuneError(f"a group of {self.group} elements isn't whole blocks: give a multiple of {BLOCK}, "
                                f"up to {MOST}")

    def scales(self, elements: int) -> int:
        """How many groups that is; the last one may be short."""
        return ceil_div(elements, self.group)

    def size(self, elements: int) -> int:
        """Bytes of so many elements."""
        return 6 * self.scales(elements) + 8 * ceil_div(elements, 64 // self.bits)

    def check_size(self, packed: Tensor, elements: int) -> None:
        """Raises EdgetuneError unless `packed` has the bytes of so many elements."""
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.shape[0] != self.size(elements):
            raise EdgetuneError(f"{tuple(packed.shape)} numbers of type {packed.dtype} aren't {elements} elements in "
                                f"{self.bits} bits: give the {self.size(elements)} bytes that group_pack made")

    def scales_of(self, packed: Tensor, elements: int) -> tuple[Tensor, Tensor]:
        """The least value and the step of every group, as written: float32 (groups,)."""
        scales = self.scales(elements)
        head = packed[: 6 * scales].clone()  # numbers lie where numbers have to
        return head[: 4 * scales].view(torch.float32), head[4 * scales :].view(torch.bfloat16).float()


LEAST_ROWS, MOST_BLOCKS = 32, 64
"""How many rows norm_backward sums in one go, channels last, and how many such sums it holds."""

BLOCK = 32
"""Elements of a group that draw chance and are written at once."""

MOST = 65536
"""Elements of the largest group."""

LARGEST = 2.0**126
"""The largest magnitude that group_pack takes: the distance of two numbers must be a float32, too."""

LEAST_STEP = 2.0**-110
"""The smallest step between codes, but for 0: 65536 over the step must be a float32."""

ROWS = 8
"""Sums over taps lie in panels of at most so many input channels, the last one filled up with zeros."""

NOTHING = 255
"""Index of a pooling window that sees padding only: its value is -inf and it passes no gradient on."""


class Pool(NamedTuple):
    """Geometry of a max-pool, in pixels: kernel, stride, padding on both sides, dilation; rows, columns."""

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dil_h: int
    dil_w: int

    def check(self, x: Tensor) -> None:
        """Raises EdgetuneError where x isn't (n c h w) or a window position doesn't fit one byte."""
        if x.dim() != 4:
            raise EdgetuneError(f"a tensor of shape {tuple(x.shape)} can't be pooled: give axes (n c h w)")
        if min(self.kernel_h, self.kernel_w, self.stride_h, self.stride_w, self.dil_h, self.dil_w) < 1:
            raise EdgetuneError(f"{self} has a kernel, stride or dilation below 1: give at least 1")
        if self.kernel_h * self.kernel_w > NOTHING:
            raise EdgetuneError(f"a window of {self.kernel_h}x{self.kernel_w} has positions beyond one byte: "
                                "keep torch's max_pool2d for this layer")
        rows, columns = (self.kernel_h, self.pad_h, self.dil_h), (self.kernel_w, self.pad_w, self.dil_w)
        for kernel, pad, dil in (rows, columns):
            if pad < 0 or pad > ((kernel - 1) * dil + 1) // 2:
                raise EdgetuneError(f"padding {pad} leaves windows of {kernel} pixels empty: "
                                    "pad by at most half of the window")

    def out_size(self, h: int, w: int, ceil_mode: bool) -> tuple[int, int]:
        """Rows and columns of the pooled map, as in torch. Raises EdgetuneError where none is left."""
        p = _pooled(h, self.kernel_h, self.stride_h, self.pad_h, self.dil_h, ceil_mode)
        q = _pooled(w, self.kernel_w, self.stride_w, self.pad_w, self.dil_w, ceil_mode)
        if p < 1 or q < 1:
            raise EdgetuneError(f"a {h}x{w} map is smaller than the pooling window {self}: pool a larger map")
        return p, q


def _pooled(size: int, kernel: int, stride: int, pad: int, dil: int, ceil_mode: bool) -> int:
    room = size + 2 * pad - dil * (kernel - 1) - 1
    out = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + pad:
        out -= 1  # a window that would start in the padding to the right is dropped
    return out
