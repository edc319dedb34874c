"""The scale of a frozen norm, learning on the patch grid.

Its gradient is the sum over pixels of the gradient at the norm's output times the normalised input. A gradient that
is constant on cells behind masks needs of the input one number a cell only: the mean under the masks. Where that would
take no fewer bytes the input is kept whole.
"""

from __future__ import annotations

from functools import reduce

import torch

from edgetune import kernels
from edgetune.contract import Tensors
from edgetune.hosts.grid import Cell, Term, cell_area, channel_sums, on, order, regrid, spread
from edgetune.hosts.pointwise import inverse_deviation, per_channel, scale_gradient, slope
from edgetune.hosts.schedule import Masks, Moment
from edgetune.recognise import MASKS

Kept = dict[str, torch.Tensor]


def _key(moment: Moment, masks: Masks = ()) -> str:
    return ":".join(("moment", moment.norm.node, *masks))


def _mean(moment: Moment, params: Tensors) -> torch.Tensor:
    return per_channel(params[moment.norm.params["running_mean"]])


def keep_moment(moment: Moment, x: torch.Tensor, y: torch.Tensor, params: Tensors, kept: Kept) -> bool:
    """Keep what the scale needs of the norm's input x and output y (n c h w) and can have at once; whether x must stay
    for `keep_masked`."""
    if not moment.cells:
        kept[_key(moment)] = x
    elif moment.reader is not moment.norm:
        kept[_key(moment)] = _behind(moment, x, y, params)
    elif () in moment.cells:
        kept[_key(moment)] = kernels.patch_mean(x, *moment.cells[()]) - _mean(moment, params)
    return any(moment.cells)


def _behind(moment: Moment, x: torch.Tensor, y: torch.Tensor, params: Tensors) -> torch.Tensor:
    """(n c p q): the means over cells of the reader's slope times x less the running mean."""
    function, cell, mean = moment.reader.function, moment.cells[()], _mean(moment, params)
    if function not in MASKS:
        return kernels.patch_mean(slope(function, y) * (x - mean), *cell)
    last = kernels.is_channels_last(x)
    bits = kernels.mask_pack(y.contiguous(memory_format=order(last)), *MASKS[function])
    return _masked(x, bits, cell, mean, last)


def _masked(x: torch.Tensor, bits: torch.Tensor, cell: Cell, mean: torch.Tensor, last: bool) -> torch.Tensor:
    """(n c p q): the means over cells of x less `mean` under a mask; centred after averaging, a full map less."""
    open_mean = kernels.masked_patch_mean(x.contiguous(memory_format=order(last)), bits, *cell)
    n, c, h, w = x.shape
    counts = kernels.bits_count(bits, n, c, h, w, *cell, last)
    return open_mean - mean * (counts / on(cell_area((h, w), cell), open_mean))


def keep_masked(held: dict[str, tuple[Moment, torch.Tensor]], params: Tensors, kept: Kept, last: bool) -> None:
    """Keep what becomes known with the latest bits in `kept` of the inputs that are `held`, and let go of those that
    nothing is missing of."""
    for node, (moment, x) in list(held.items()):
        missing = [masks for masks in moment.cells if _key(moment, masks) not in kept]
        ready = [masks for masks in missing if all(f"bits:{mask}" in kept for mask in masks)]
        for masks in ready:
            bits = reduce(torch.bitwise_and, (kept[f"bits:{mask}"] for mask in masks))
            kept[_key(moment, masks)] = _masked(x, bits, moment.cells[masks], _mean(moment, params), last)
        if len(ready) == len(missing):
            del held[node]


def learn_moment(moment: Moment, kept: Tensors, terms: list[Term], hw: tuple[int, int], last: bool,
                 params: Tensors) -> torch.Tensor:
    """(c): the gradient of the norm's scale, from what was kept and from the terms at the reader's output."""
    if not moment.cells:
        g = spread(terms, hw, last)
        assert g is not None
        return scale_gradient(moment.norm, g, kept[_key(moment)], params)
    sums = []
    for term in terms:
        cell = moment.cells[term.masks]
        g = regrid(term.value, hw, term.cell, cell)
        sums.append(channel_sums(g * kept[_key(moment, term.masks)], hw, cell))
    return torch.stack(sums).sum(0) * inverse_deviation(moment.norm, params)
