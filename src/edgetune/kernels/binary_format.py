"""What the versions of the convolutions with one bit a weight share: geometry, formats, checks.

Bits of a map (n c h w) are int64 words (n h w words): 1 is +1 and 0 is -1, the lowest bit is the lowest channel, and
the last word is filled up with 0 bits. Plain bits of filters (o i u v) are the same, (o u v words). Arranged filters,
(groups blocks u v bytes 4), are what the convolutions read: blocks of 32 filters of one group, of which each byte has 8
input channels of one filter (native/binary.h); still one bit a weight, where a group has whole blocks of filters and
whole bytes of channels. Those of a depthwise layer, (u v words), have a bit a channel (native/depthwise.h).
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from edgetune.errors import EdgetuneError
from edgetune.kernels.geometry import ceil_div

WORD, LANES = 64, 32
EXACT = 2**24
"""Dots below are exact as float32."""

MOST_TAPS = 64
"""Of a depthwise layer."""

AT_ONCE = 2**19
"""Bytes of samples that are made ready at once, where one sample doesn't take more."""


class BinaryLayer(NamedTuple):
    """A convolution with one bit a weight; pixels, rows before columns. pad_value is what the border counts as."""

    channels: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    pad_top: int = 0
    pad_left: int = 0
    pad_bottom: int = 0
    pad_right: int = 0
    dil_h: int = 1
    dil_w: int = 1
    groups: int = 1
    pad_value: int = 0

    def check(self) -> None:
        """Raises EdgetuneError where there is no such layer."""
        least = min(self.channels, self.kernel_h, self.kernel_w, self.stride_h, self.stride_w, self.dil_h, self.dil_w)
        if least < 1 or self.out_channels < 0:
            raise EdgetuneError(f"{self} has channels, a kernel, stride or dilation below 1: give at least 1")
        if min(self.pads) < 0:
            raise EdgetuneError(f"pads of {self.pads} cut the map: give 0 or more, and crop the map before")
        check_groups(self.channels, self.groups)
        check_groups(self.out_channels, self.groups)
        if self.products >= EXACT:
            raise EdgetuneError(f"a sum of {self.products} products isn't exact: give less than {EXACT} of them")

    @property
    def pads(self) -> tuple[int, int, int, int]:
        return self.pad_top, self.pad_left, self.pad_bottom, self.pad_right

    @property
    def products(self) -> int:
        """Of one output."""
        return self.channels // self.groups * self.kernel_h * self.kernel_w

    @property
    def is_depthwise(self) -> bool:
        """Whether the native kernels take it as such, and need no scratch (native/depthwise.h)."""
        single = self.channels == self.out_channels == self.groups
        return single and self.kernel_h * self.kernel_w <= MOST_TAPS

    @property
    def bytes_of_tap(self) -> int:
        """Bytes that a filter takes at one tap."""
        return ceil_div(self.channels // self.groups, 8)

    def out_size(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns that come out. Raises EdgetuneError where none do."""
        p = (h + self.pad_top + self.pad_bottom - self.dil_h * (self.kernel_h - 1) - 1) // self.stride_h + 1
        q = (w + self.pad_left + self.pad_right - self.dil_w * (self.kernel_w - 1) - 1) // self.stride_w + 1
        if p < 1 or q < 1:
            raise EdgetuneError(f"a {h}x{w} map is smaller than the filters of {self}: give a larger one, or pad it")
        return p, q

    def filter_shape(self) -> tuple[int, ...]:
        """Of the arranged filters."""
        if self.is_depthwise:
            return self.kernel_h, self.kernel_w, words_of(self.channels)
        blocks = ceil_div(self.out_channels // self.groups, LANES)
        return self.groups, blocks, self.kernel_h, self.kernel_w, self.bytes_of_tap, LANES // 8

    def check_filters(self, filters: Tensor) -> None:
        """Raises EdgetuneError unless these are the layer's arranged filters."""
        if filters.dtype != torch.int64 or tuple(filters.shape) != _filter_shape(self):
            raise EdgetuneError(f"filters of shape {tuple(filters.shape)} and type {filters.dtype} aren't those of "
                                f"{self}: give what binary_filters made of its weight, int64 {self.filter_shape()}")

    def padded(self, h: int, w: int, together: int) -> tuple[int, int]:
        """Rows and columns that the kernels read of the padded map, where `together` columns come out at once."""
        p, q = self.out_size(h, w)
        columns = ceil_div(q, together) * together
        return ((p - 1) * self.stride_h + (self.kernel_h - 1) * self.dil_h + 1,
                (columns - together) * self.stride_w + (self.kernel_w - 1) * self.dil_w + 1)


_filter_shape = cache(BinaryLayer.filter_shape)


@lru_cache(1024)
def _out_shape(layer: BinaryLayer, bits: tuple[int, ...], filters: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """What comes out where these are the shapes of the layer's bits and filters, else None."""
    fits = len(bits) == 4 and bits[3] == words_of(layer.channels) and filters == _filter_shape(layer)
    if not fits or layer.pad_value not in (-1, 0, 1):
        return None
    return bits[0], layer.out_channels, *layer.out_size(bits[1], bits[2])


def out_shape(layer: BinaryLayer, bits: Tensor, filters: Tensor) -> tuple[int, int, int, int]:
    """What a convolution of bits gives: n o p q. Raises EdgetuneError where the three don't belong together."""
    sizes = bits.shape
    if bits.dtype == filters.dtype == torch.int64 and all(type(size) is int for size in (*sizes, *filters.shape)):
        known = _out_shape(layer, sizes, filters.shape)  # every call pays for its checks; most are alike
        if known is not None:
            return known
    if layer.pad_value not in (-1, 0, 1):
        raise EdgetuneError(f"a border of {layer.pad_value} isn't made of bits: give pad_value -1, 0 or 1")
    n, h, w = check_signs(bits, layer.channels)
    layer.check_filters(filters)
    return n, layer.out_channels, *layer.out_size(h, w)


@cache
def checked_layer(numbers: tuple[int, ...]) -> BinaryLayer:
    """The layer of these numbers. Raises EdgetuneError where there is none."""
    if len(numbers) != len(BinaryLayer._fields):
        raise EdgetuneError(f"{len(numbers)} numbers aren't a layer: give a BinaryLayer")
    layer = BinaryLayer(*numbers)
    layer.check()
    return layer


def check_groups(channels: int, groups: int) -> None:
    """Raises EdgetuneError where channels don't divide into groups."""
    if groups < 1 or channels % groups:
        raise EdgetuneError(f"{channels} channels don't divide into {groups} groups: give the layer's own groups")


def words_of(channels: int) -> int:
    """Words of the bits of one pixel."""
    return ceil_div(channels, WORD)


def check_signs(bits: Tensor, channels: int) -> tuple[int, int, int]:
    """Samples, rows and columns of these bits. Raises EdgetuneError unless they are those of so many channels."""
    words = words_of(channels)
    if bits.dtype != torch.int64 or bits.dim() != 4 or bits.shape[3] != words:
        raise EdgetuneError(f"bits of shape {tuple(bits.shape)} and type {bits.dtype} aren't those of {channels} "
                            f"channels: give the int64 (n h w {words}) that sign_pack made")
    n, h, w, _ = bits.shape
    return n, h, w


def check_per_channel(name: str, x: Tensor, dtype: torch.dtype, channels: int) -> None:
    """Raises EdgetuneError unless x has a number of this type for every output channel."""
    if x.dtype != dtype or x.shape != (channels,):
        raise EdgetuneError(f"a {name} of shape {tuple(x.shape)} and type {x.dtype} doesn't belong to {channels} "
                            f"output channels: give {dtype} ({channels},)")


def check_residual(x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises EdgetuneError unless x can be added to what comes out."""
    if x.dtype != torch.float32 or x.shape != shape:
        raise EdgetuneError(f"a residual of shape {tuple(x.shape)} and type {x.dtype} can't be added: give "
                            f"torch.float32 {shape}")


def order_of_lanes(device: torch.device) -> Tensor:
    """Which filter of its block lies at each lane."""
    return torch.arange(LANES, device=device).view(2, -1).t().reshape(-1)
