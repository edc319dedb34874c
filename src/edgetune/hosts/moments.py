"""The scale of a frozen norm, learning on the patch grid.

Its gradient is the sum over pixels of the gradient at the norm's output times the normalised input. Where the
gradient behind the norm's activation is constant on cells, that sum needs of the input one number a cell only: the
mean of slope times normalised input. Elsewhere the input is kept whole.
"""

from __future__ import annotations

import torch

from edgetune import kernels
from edgetune.contract import Tensors
from edgetune.hosts.grid import PIXEL, Term, cell_area, channel_sums, on, order, project, spread
from edgetune.hosts.pointwise import inverse_deviation, per_channel, scale_gradient, slope
from edgetune.hosts.schedule import Moment
from edgetune.recognise import MASKS


def keep_moment(moment: Moment, x: torch.Tensor, y: torch.Tensor, params: Tensors) -> torch.Tensor:
    """What the norm's scale needs of its input x and output y (n c h w): x itself, or (n c p q), the means over cells
    of slope times x less the running mean."""
    if moment.cell == PIXEL:
        return x
    cell, mean = moment.cell, per_channel(params[moment.norm.params["running_mean"]])
    if moment.reader is moment.norm:
        return kernels.patch_mean(x, *cell) - mean
    function = moment.reader.function
    if function not in MASKS:
        return kernels.patch_mean(slope(function, y) * (x - mean), *cell)
    last = kernels.is_channels_last(x)
    bits = kernels.mask_pack(y.contiguous(memory_format=order(last)), *MASKS[function])
    # centred after averaging: a full map less
    open_mean = kernels.masked_patch_mean(x, bits, *cell)
    n, c, h, w = x.shape
    counts = kernels.bits_count(bits, n, c, h, w, *cell, last)
    return open_mean - mean * (counts / on(cell_area((h, w), cell), open_mean))


def learn_moment(moment: Moment, kept: torch.Tensor, terms: list[Term], hw: tuple[int, int], last: bool,
                 params: Tensors) -> torch.Tensor:
    """(c): the gradient of the norm's scale, from what was kept and from the terms at the reader's output."""
    if moment.cell == PIXEL:
        g = spread(terms, hw, last)
        assert g is not None
        return scale_gradient(moment.norm, g, kept, params)
    g = project(terms, hw, moment.cell)
    assert g is not None
    return channel_sums(g * kept, hw, moment.cell) * inverse_deviation(moment.norm, params)
