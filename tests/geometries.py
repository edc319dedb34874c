"""Random convolutions, for every test that compares the clever with the slow."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from edgetune.overlap import ConvGeometry


@st.composite
def geometries(draw: st.DrawFn, max_size: int = 13) -> ConvGeometry:
    """Kernels 1 to 7 (even too), strides, dilations, asymmetric and negative-free pads, full, grouped and depthwise."""
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    pads = tuple(draw(st.integers(0, 3)) for _ in range(4))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    smallest = [max(1, reach[0] - pads[0] - pads[1]), max(1, reach[1] - pads[2] - pads[3])]
    in_hw = (draw(st.integers(smallest[0], smallest[0] + max_size)),
             draw(st.integers(smallest[1], smallest[1] + max_size)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    in_per_group, out_per_group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 3)]))
    return ConvGeometry(in_channels=groups * in_per_group, out_channels=groups * out_per_group, groups=groups,
                        in_hw=in_hw, kernel=kernel, stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
                        dilation=dilation, pads=pads)


def operands(geometry: ConvGeometry, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (n c h w), weight (o i u v) and gy (n o h' w'), float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
    x, w, gy = (torch.randn(size, generator=generator, dtype=torch.float64) for size in (
        (batch, geometry.in_channels, *geometry.in_hw), shape, (batch, geometry.out_channels, *geometry.out_hw)))
    return x, w, gy
