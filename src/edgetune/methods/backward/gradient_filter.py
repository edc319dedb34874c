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
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from edgetune import kernels
from edgetune.contract import LayerMethod
from edgetune.graph import Call
from edgetune.hosts.grid import PIXEL, Cell, cell_area, on
from edgetune.hosts.products import (
    mix_input,
    mix_weight,
    scaled_by_channel,
    spread_taps,
    sum_taps,
)
from edgetune.hosts.walsh import analyse, fold_bases, synthesise
from edgetune.overlap import ConvGeometry, cells, mean_factors, overlap

Taps = Literal["mean", "grid"]


def input_cell(geometry: ConvGeometry, patch_px: int, taps: Taps) -> Cell:
    """The cell of the input that lies under one patch of the output; one pixel where the grid form averages nothing."""
    if taps == "grid" and patch_px == 1:
        return PIXEL
    return patch_px * geometry.stride[0], patch_px * geometry.stride[1]


class Received(NamedTuple):
    """Mean form: g as the input gradient reads it, and as the weight gradient does: `factor` times `weight`."""

    input: torch.Tensor
    weight: torch.Tensor
    factor: float


class _Factors(NamedTuple):
    """What g is multiplied by, (p q); None where that is 1 everywhere. `ratio`: weight = ratio * input everywhere."""

    input: torch.Tensor | None
    weight: torch.Tensor
    ratio: float | None


def received_mean(g: torch.Tensor, geometry: ConvGeometry, patch_px: int) -> Received:
    """Mean form: g (n o p q) on the input's cells, laid out channel by channel.

    Where output and input have equally many cells each keeps its own factor; elsewhere (a valid convolution on a
    small map) the overlap table itself carries g to the input's cells.
    """
    factors = _factors(geometry, patch_px, g.dtype, g.device)
    if factors is not None:
        to_input = scaled_by_channel(g, factors.input)
        if factors.ratio is not None:
            return Received(to_input, to_input, factors.ratio)
        return Received(to_input, scaled_by_channel(g, factors.weight), 1.0)
    cell_in = input_cell(geometry, patch_px, "mean")
    rows, columns = (on(overlap(geometry, axis, patch_px, cell_in[axis]).mean(0), g) for axis in (0, 1))
    carried = rows.T @ g @ columns
    return Received(carried / on(cell_area(geometry.in_hw, cell_in), g), carried, 1.0)


@lru_cache(maxsize=4096)
def _factors(geometry: ConvGeometry, patch_px: int, dtype: torch.dtype, device: torch.device) -> _Factors | None:
    """The factors of a layer's cells, or None where output and input do not have equally many cells."""
    cell_in = input_cell(geometry, patch_px, "mean")
    grid_out = tuple(cells(size, patch_px) for size in geometry.out_hw)
    if grid_out != tuple(cells(size, c) for size, c in zip(geometry.in_hw, cell_in, strict=True)):
        return None
    rows, columns = (mean_factors(geometry, axis, patch_px, cell_in[axis]) for axis in (0, 1))
    m, n = rows[0][:, None] * columns[0], rows[1][:, None] * columns[1]
    ratio = float(n.max() / m.max()) if m.numel() and float(m.max()) > 0 else 1.0
    return _Factors(input=None if bool((m == 1).all()) else m.to(device, dtype), weight=n.to(device, dtype),
                    ratio=ratio if torch.allclose(n, ratio * m, rtol=1e-12, atol=0) else None)


def received_grid(g: torch.Tensor, geometry: ConvGeometry, patch_px: int) -> torch.Tensor:
    """Grid form: g (n o p q) -> what each tap carries to each input cell, (n o u v p' q')."""
    cell_in = input_cell(geometry, patch_px, "grid")
    rows, columns = (on(overlap(geometry, axis, patch_px, cell_in[axis]), g) for axis in (0, 1))
    carried = torch.einsum("nopq,vqx->nopvx", g, columns)
    return torch.einsum("nopvx,upy->nouvyx", carried, rows)


def grid_backward(x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                  patch_px: int, taps: Taps, wants_input: bool = True,
                  ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both gradients on the grid from patch means of x (None: no gw) and of gy: gx (n c p' q') and gw.

    In the mean form gw is (o i), the value of every tap; in the grid form (o i u v).
    """
    backward = _mean_backward if taps == "mean" else _grid_backward
    return backward(x, g, weight, geometry, patch_px, wants_input)


def _mean_backward(x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                   patch_px: int, wants_input: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    to_input, to_weight, factor = received_mean(g, geometry, patch_px)
    gx = gw = None
    if wants_input:
        gx = mix_input(to_input.flatten(2), sum_taps(weight.to(g.dtype)), geometry.groups)
        gx = gx.view(g.shape[0], geometry.in_channels, *to_input.shape[2:])
    if x is not None:
        gw = mix_weight(to_weight.flatten(2), x.to(g.dtype).flatten(2), geometry.groups, factor)
    return gx, gw


def _grid_backward(x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                   patch_px: int, wants_input: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    n, o, i = g.shape[0], geometry.out_channels, geometry.in_channels // geometry.groups
    ku, kv = geometry.kernel
    t = received_grid(g, geometry, patch_px)
    grid = t.shape[4:]
    # taps become further channels of the product: (n, o u v, l) with weight (o u v, i)
    t = t.flatten(4).flatten(1, 3)
    gx = gw = None
    if wants_input:
        gx = mix_input(t, weight.to(g.dtype).permute(0, 2, 3, 1).reshape(o * ku * kv, i), geometry.groups)
        area = cell_area(geometry.in_hw, input_cell(geometry, patch_px, "grid"))
        gx = gx.view(n, geometry.in_channels, *grid) / on(area, g)
    if x is not None:
        gw = mix_weight(t, x.to(g.dtype).flatten(2), geometry.groups)
        gw = gw.view(o, ku, kv, i).permute(0, 3, 1, 2).contiguous()
    return gx, gw


def grid_gradients(x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                   patch_px: int, taps: Taps, wants_input: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """As `grid_backward`, but gw (o i u v) with its taps filled in, in the memory order of the weight."""
    gx, gw = grid_backward(x, g, weight, geometry, patch_px, taps, wants_input)
    return gx, spread_taps(gw, weight) if gw is not None and taps == "mean" else gw


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
        gx, gw = grid_gradients(kept, g, weight, geometry, self.patch_px, self.taps, wants_input)
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
