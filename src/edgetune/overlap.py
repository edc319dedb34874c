"""Where a convolution's taps land on a grid of cells: one integer table carries all geometry.

Along one axis, output cell `a` covers `cell_out` output pixels and input cell `b` covers `cell_in` input pixels
(the last of each may be short). `O[u, a, b]` counts the output pixels j of `a` whose tap u lands in `b`:

    stride * j + dilation * u - pad_before  in  b

Stride, asymmetric padding, dilation, borders and short cells all live in it; in two dimensions every count is a
product of the two axes. With cells of one pixel it is the convolution's own incidence table.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from edgetune.record import Record


class ConvGeometry(Record):
    """Everything about a 2-D convolution but its numbers. Sizes and pads are in pixels.

    `pads` is (top, bottom, left, right). With `same` the pads follow the input size by TensorFlow's SAME rule.
    """

    in_channels: int
    out_channels: int
    groups: int
    in_hw: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    same: bool = False

    @property
    def out_hw(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        top, bottom, left, right = self.pads
        sizes = zip(self.in_hw, (top + bottom, left + right), self.kernel, self.stride, self.dilation, strict=True)
        rows, columns = (max((h + pad - d * (k - 1) - 1) // s + 1, 0) for h, pad, k, s, d in sizes)
        return rows, columns

    @property
    def symmetric(self) -> bool:
        """Whether the convolution itself can pad, without a copy of its input."""
        top, bottom, left, right = self.pads
        return top == bottom and left == right

    @property
    def depthwise(self) -> bool:
        """One input channel a group (a channel multiplier is allowed)."""
        return self.groups == self.in_channels and self.groups > 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample's forward pass."""
        rows, columns = self.out_hw
        return (self.out_channels * (self.in_channels // self.groups) * self.kernel[0] * self.kernel[1]
                * rows * columns)

    def at(self, height: int, width: int) -> ConvGeometry:
        """The same layer on a map of another size."""
        return self if (height, width) == self.in_hw else _resized(self, height, width)


def same_pads(in_hw: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int],
              dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """TensorFlow's SAME rule: the output has ceil(size / stride) pixels, the odd pixel of padding goes last."""
    pads: list[int] = []
    for size, k, s, d in zip(in_hw, kernel, stride, dilation, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        pads += [total // 2, total - total // 2]
    return pads[0], pads[1], pads[2], pads[3]


@lru_cache(maxsize=4096)
def _resized(geometry: ConvGeometry, height: int, width: int) -> ConvGeometry:
    pads = geometry.pads
    if geometry.same:
        pads = same_pads((height, width), geometry.kernel, geometry.stride, geometry.dilation)
    return geometry.model_copy(update={"in_hw": (height, width), "pads": pads})


def cells(size: int, cell: int) -> int:
    """How many cells of `cell` pixels cover `size` pixels."""
    return -(-size // cell)


@lru_cache(maxsize=4096)
def cell_sizes(size: int, cell: int) -> torch.Tensor:
    """Pixels of each cell along one axis, float64 (cells); the last may be short."""
    starts = torch.arange(0, size, cell)
    return (starts + cell).clamp(max=size).sub(starts).double()


@lru_cache(maxsize=1024)
def overlap(geometry: ConvGeometry, axis: int, cell_out: int, cell_in: int) -> torch.Tensor:
    """The table O (u, a, b) of one axis (0 rows, 1 columns), float64 holding exact integers."""
    size_in, size_out = geometry.in_hw[axis], geometry.out_hw[axis]
    table = torch.zeros(geometry.kernel[axis], cells(size_out, cell_out), cells(size_in, cell_in),
                        dtype=torch.float64)
    j = torch.arange(size_out)
    for u in range(geometry.kernel[axis]):
        landing = geometry.stride[axis] * j + geometry.dilation[axis] * u - geometry.pads[2 * axis]
        inside = (landing >= 0) & (landing < size_in)
        a, b = j[inside] // cell_out, landing[inside] // cell_in
        table[u].index_put_((a, b), torch.ones(a.numel(), dtype=torch.float64), accumulate=True)
    return table


@lru_cache(maxsize=1024)
def mean_factors(geometry: ConvGeometry, axis: int, cell_out: int, cell_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean form's factors along one axis: m (b) for gradients of inputs, n (a) for gradients of weights.

    m[b] = sum_{a,u} O / (k |b|) and n[a] = sum_{b,u} O / k, with k the axis's number of taps; they carry the
    stride and the border and are not the same numbers.
    """
    table = overlap(geometry, axis, cell_out, cell_in)
    taps = geometry.kernel[axis]
    m = table.sum((0, 1)) / (taps * cell_sizes(geometry.in_hw[axis], cell_in))
    return m, table.sum((0, 2)) / taps


class SmallConvolution(NamedTuple):
    """A layer seen on its grid as a convolution of stride 1: `mix` says how much of tap u (rows; v: columns) goes into
    each of its taps, (u d) and (v e), float64; `padding` is in cells."""

    mix: tuple[torch.Tensor, torch.Tensor]
    padding: tuple[int, int]


@lru_cache(maxsize=1024)
def small_convolution(geometry: ConvGeometry, cell_out: int, cell_in: tuple[int, int]) -> SmallConvolution | None:
    """The layer on its grid as one small convolution, or None where the overlap changes from cell to cell: at short
    last cells, and where the taps reach further on one side than on the other."""
    axes = [_shift_invariant(overlap(geometry, axis, cell_out, cell_in[axis])) for axis in (0, 1)]
    if axes[0] is None or axes[1] is None:
        return None
    (rows, top), (columns, left) = axes[0], axes[1]
    return SmallConvolution((rows, columns), (top, left))


def _shift_invariant(table: torch.Tensor) -> tuple[torch.Tensor, int] | None:
    """O (u a b) as T (u d) with O[u, a, b] = T[u, b - a + padding], zero outside; None where there is no such T."""
    count_out, count_in = table.shape[1:]
    if count_out != count_in or count_in == 0:
        return None
    a, b = torch.nonzero(table.sum(0), as_tuple=True)
    reach = int((b - a).abs().max()) if a.numel() else 0
    mix = torch.zeros(table.shape[0], 2 * reach + 1, dtype=table.dtype)
    for d in range(-reach, reach + 1):
        band = torch.diagonal(table, d, 1, 2)
        if band.numel() and not bool((band == band[:, :1]).all()):
            return None
        if band.numel():
            mix[:, d + reach] = band[:, 0]
    return mix, reach
