"""Gradient filtering: gradients constant on patches, so that backward becomes small matrix products.

What it does
    Takes the gradient of a convolution's output as constant on patches of `patch_px` x `patch_px` pixels. The input
    is kept as its patch means only, and both products of the backward pass run on the grid of patches.
    `taps="mean"` gives every tap of a kernel the same gradient; `taps="grid"` keeps a gradient per tap, as a small
    convolution on the grid. `bases` keeps more than the mean of a patch: the first Walsh-Hadamard functions on it.

Shapes
    x (n c h w), weight (o i u v), gy (n o h' w'), r = patch_px, s = stride
    kept (n c ceil(h/rs) ceil(w/rs)), with `bases` b: (n c b ceil(h/rs) ceil(w/rs))

What is kept (bytes)
    4 n c b ceil(h/rs) ceil(w/rs) instead of 4 n c h w; nothing when the weight is frozen.

What changes in the gradient or the answer
    The forward pass does not change, bit for bit, and the bias gradient is exact. With "grid", the input gradient is
    the patch mean of the exact one for a patch-constant gy; at patch_px = 1 it is exact. With "mean", stride, border,
    padding and dilation enter as one factor a cell (see `edgetune.overlap`), so strided layers have the right scale
    and same-padded ones no bias. 2**k bases an axis span exactly the patches of patch_px / 2**k.

When not to use
    Where the output map is one patch or less nothing is left to average but the whole map; in the first layers of a
    deep network the gradient's direction is lost (the planner measures it). 1 x 1 maps gain nothing.

Reference
    Yang et al., "Efficient On-device Training via Gradient Filtering", CVPR 2023, equations 2-5 (scale and border
    corrected here); "LBP-WHT", NeurIPS 2023, for the bases.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field

from edgetune import kernels
from edgetune.contract import LayerMethod
from edgetune.graph import Call
from edgetune.hosts.grid import PIXEL, Cell, cell_area, on
from edgetune.hosts.walsh import analyse, fold_bases, synthesise
from edgetune.overlap import (
    ConvGeometry,
    SmallConvolution,
    cells,
    mean_factors,
    overlap,
    small_convolution,
)

Taps = Literal["mean", "grid"]


def input_cell(geometry: ConvGeometry, patch_px: int, taps: Taps) -> Cell:
    """The cell of the input that lies under one patch of the output; one pixel where the grid form averages nothing."""
    if taps == "grid" and patch_px == 1:
        return PIXEL
    return patch_px * geometry.stride[0], patch_px * geometry.stride[1]


Factors = tuple[torch.Tensor | None, torch.Tensor | None]


@lru_cache(maxsize=4096)
def _factors(geometry: ConvGeometry, patch_px: int) -> Factors | None:
    """Mean form: what g (n o p q) is multiplied by for gx and for gw, float64 (p q); None for 1 everywhere.

    None where output and input do not have equally many cells.
    """
    cell_in = input_cell(geometry, patch_px, "mean")
    sizes = zip(geometry.out_hw, geometry.in_hw, cell_in, strict=True)
    if any(cells(out, patch_px) != cells(size, cell) for out, size, cell in sizes):
        return None
    rows, columns = (mean_factors(geometry, axis, patch_px, cell_in[axis]) for axis in (0, 1))
    m, n = rows[0][:, None] * columns[0], rows[1][:, None] * columns[1]
    return None if bool((m == 1).all()) else m, n


def grid_backward(x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                  patch_px: int, taps: Taps, wants_input: bool = True, spread: bool = True,
                  ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both gradients on the grid from patch means of x (None: no gw) and of gy: gx (n c p' q') and gw (o i u v).

    In the mean form, where every tap has the same gradient, gw is (o i) unless `spread`.
    """
    x, weight = None if x is None else x.to(g.dtype), weight.to(g.dtype)
    if taps == "mean":
        return _mean_backward(x, g, weight, geometry, patch_px, wants_input, spread)
    return _grid_backward(x, g, weight, geometry, patch_px, wants_input)


def _mean_backward(x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                   patch_px: int, wants_input: bool, spread: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    factors = _factors(geometry, patch_px)
    if factors is None:
        # a valid convolution on a small map: the overlap table itself carries g to the input's cells
        cell_in = input_cell(geometry, patch_px, "mean")
        rows, columns = (on(overlap(geometry, axis, patch_px, cell_in[axis]).mean(0), g) for axis in (0, 1))
        g, factors = rows.T @ g @ columns, (_reciprocal_area(geometry.in_hw, cell_in), None)
    to_input, to_weight = (None if table is None else on(table, g) for table in factors)
    return kernels.grid_products(g, to_input, to_weight, x, weight, geometry.groups, wants_input, spread)


@lru_cache(maxsize=1024)
def _reciprocal_area(hw: tuple[int, int], cell: Cell) -> torch.Tensor:
    return cell_area(hw, cell).reciprocal()


def _grid_backward(x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                   patch_px: int, wants_input: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    cell_in = input_cell(geometry, patch_px, "grid")
    small = small_convolution(geometry, patch_px, cell_in)
    if small is not None:
        return _small_backward(x, g, weight, geometry, small, cell_in, wants_input)
    # taps become further output channels, in the order (o u v), of a product with one tap
    t = _received_by_taps(g, geometry, patch_px, cell_in).flatten(1, 3)
    one_tap = weight.permute(0, 2, 3, 1).reshape(-1, weight.shape[1], 1, 1)
    to_input = on(_reciprocal_area(geometry.in_hw, cell_in), g)
    gx, gw = kernels.grid_products(t, to_input, None, x, one_tap, geometry.groups, wants_input)
    if gw is not None:
        o, i, ku, kv = weight.shape
        gw = gw.view(o, ku, kv, i).permute(0, 3, 1, 2).contiguous()
    return gx, gw


def _received_by_taps(g: torch.Tensor, geometry: ConvGeometry, patch_px: int, cell_in: Cell) -> torch.Tensor:
    """g (n o p q) -> what each tap carries to each input cell, (n o u v p' q')."""
    rows, columns = (on(overlap(geometry, axis, patch_px, cell_in[axis]), g) for axis in (0, 1))
    carried = torch.einsum("nopq,vqx->nopvx", g, columns)
    return torch.einsum("nopvx,upy->nouvyx", carried, rows)


def _small_backward(x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                    small: SmallConvolution, cell_in: Cell, wants_input: bool,
                    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The grid form as a convolution on the grid, whose taps are mixtures of the layer's."""
    rows, columns = (on(table, g) for table in small.mix)
    mixed = torch.einsum("oiuv,ud,ve->oide", weight, rows, columns)
    grid = tuple(cells(size, cell) for size, cell in zip(geometry.in_hw, cell_in, strict=True))
    like = g.new_empty(1).expand(g.shape[0], geometry.in_channels, *grid) if x is None else x
    gx, gw, _ = torch.ops.aten.convolution_backward(g, like, mixed, None, (1, 1), small.padding, (1, 1), False, (0, 0),
                                                    geometry.groups, (wants_input, x is not None, False))
    if wants_input:
        gx = gx * on(_reciprocal_area(geometry.in_hw, cell_in), g)
    return gx, None if gw is None else torch.einsum("oide,ud,ve->oiuv", gw, rows, columns)


class GradientFilter(LayerMethod):
    """Patches of `patch_px` output pixels; `taps` mean or grid; `bases` Walsh functions a patch (mean form)."""

    method = "gradient_filter"

    patch_px: int = Field(2, ge=1, le=4096)
    taps: Taps = "mean"
    bases: int = Field(1, ge=1, le=16)

    def refuse(self, call: Call) -> str | None:
        if call.kind != "conv":
            return f"is a {call.kind} layer, not a convolution: leave it exact"
        if self.bases > 1 and self.taps == "grid":
            return ("has bases > 1 with taps='grid': use a smaller patch_px, which spans the same functions, "
                    "or taps='mean'")
        return None

    def save(self, x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return self._analyse(x, input_cell(geometry, self.patch_px, self.taps))

    def receive(self, gy: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return self._analyse(gy, (self.patch_px, self.patch_px)).to(torch.promote_types(gy.dtype, torch.float32))

    def gradients(self, kept: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                  wants_input: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        samples, cell = g.shape[0], input_cell(geometry, self.patch_px, self.taps)
        if self.bases > 1:
            kept, g = None if kept is None else fold_bases(kept), fold_bases(g)
        gx, gw = grid_backward(kept, g, weight, geometry, self.patch_px, self.taps, wants_input)
        if gx is None:
            return None, gw
        if self.bases > 1:
            coefficients = gx.view(samples, self.bases, *gx.shape[1:]).transpose(1, 2)
            return synthesise(coefficients, geometry.in_hw, cell), gw
        return kernels.patch_spread(gx, *geometry.in_hw, *cell), gw

    def grad_input(self, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        gx, _ = self.gradients(None, g, weight, geometry, wants_input=True)
        assert gx is not None
        return gx

    def grad_weight(self, kept: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        # the shape and memory order of a weight, without its numbers
        weight = g.new_empty(1).expand(geometry.out_channels, kept.shape[1] // geometry.groups, *geometry.kernel)
        _, gw = self.gradients(kept, g, weight, geometry, wants_input=False)
        assert gw is not None
        return gw

    def _analyse(self, x: torch.Tensor, cell: Cell) -> torch.Tensor:
        if self.bases == 1:
            return kernels.patch_mean(x, *cell, by_channel=True)
        return analyse(x, cell, self.bases)
