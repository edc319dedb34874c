"""The gradient filter as published, faults and all: a row of the transfer benchmark, no method to train with.

Both gradients of a layer of stride s come out s**2 too large (the input is summed over r s x r s pixels while
the output gradient is averaged over r x r), border taps count as inside the map, and the patches of input and
output may be shifted against each other on maps that r does not divide. The operator put right is in
`edgetune.methods.backward.gradient_filter`.

Reference: Yang et al., CVPR 2023, equations 2-5, and what the released code does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field

from edgetune import kernels
from edgetune.contract import LayerMethod
from edgetune.graph import Call
from edgetune.overlap import ConvGeometry, cells


class PublishedFilter(LayerMethod):
    """Patches of `patch_px` output pixels; full or depthwise convolutions. It has no name for plan files."""

    patch_px: int = Field(2, ge=1)

    def refuse(self, call: Call) -> str | None:
        if call.kind != "conv" or call.geometry is None:
            return f"is a {call.kind} layer, not a convolution: leave it exact"
        if call.geometry.groups > 1 and call.geometry.groups != call.geometry.out_channels:
            return "has groups that the published operator fails on: leave it exact"
        return None

    def save(self, x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:  # type: ignore[override]
        """x (n c h w) -> sums over patches of patch_px * stride pixels, (n c p q)."""
        return _pool_sum(x, self._input_patch(geometry))

    def receive(self, gy: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        """gy (n o h w) -> means over the valid pixels of each patch, (n o p q)."""
        patch = (self.patch_px, self.patch_px)
        return _pool_sum(gy, patch) / _pool_sum(torch.ones_like(gy[:1, :1]), patch)

    def grad_input(self, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        """(n o p q) -> gx (n c h w): the sum of the weight's taps times g, on every pixel."""
        p, q = g.shape[2:]
        small, _ = kernels.grid_products(g, None, None, None, weight, geometry.groups)
        assert small is not None
        rows, columns = self._input_patch(geometry)
        full = small.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
        (h, w), (top, left) = geometry.in_hw, _pads(geometry.in_hw, (p, q), (rows, columns))
        return full[:, :, top : top + h, left : left + w]

    def grad_weight(self, kept: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        """(n c p q), (n o p q) -> gw (o i u v), every tap the same."""
        weight = g.new_empty(1).expand(geometry.out_channels, kept.shape[1] // geometry.groups, *geometry.kernel)
        _, gw = kernels.grid_products(g, None, None, kept, weight, geometry.groups, wants_input=False)
        assert gw is not None
        return gw

    def _input_patch(self, geometry: ConvGeometry) -> tuple[int, int]:
        return self.patch_px * geometry.stride[0], self.patch_px * geometry.stride[1]


def _pool_sum(x: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """Sums over patches of a map padded alike on either side, the odd row at the far end dropped."""
    hw = (int(x.shape[2]), int(x.shape[3]))
    top, left = _pads(hw, (cells(hw[0], patch[0]), cells(hw[1], patch[1])), patch)
    return F.avg_pool2d(F.pad(x, (left, left, top, top)), patch) * (patch[0] * patch[1])


def _pads(hw: tuple[int, int], grid: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (-(-(count * r - size) // 2) for size, count, r in zip(hw, grid, patch, strict=True))
    return rows, columns
