"""HOSVD: convolution inputs kept as the smallest factors that hold a share of their energy.

What it does
    Every step decomposes the input of each learning convolution along its four axes, keeps of each axis the leading
    singular vectors that hold `energy` of it, and a core. The weight gradient is computed from core and bases; the
    input is never made whole again. How small the factors are depends on the data.

Shapes
    x (n c h w), weight (o i u v), gy (n o h' w'); kept core (a b d e) and bases n (n a), c (c b), h (h d), w (w e)

What is kept (bytes)
    4 (a b d e + n a + c b + h d + w e) for the ranks of this very batch; an axis that is kept whole has no basis.
    Never more than 4 `most` n c h w, or 4 (1 + n + c + h + w) where that is more: ranks are cut until the factors
    fit. That bound is what is predicted. Where factors would be no smaller than x, x itself is kept.

What changes in the gradient or the answer
    gx is exact; gw is that of the nearest map which the kept subspaces hold. Of the squared norm of x at most
    4 (1 - energy) is lost, if `most` cuts nothing. With `energy` = 1 and `most` = 1 gw is exact. An input that is not
    finite is kept whole, beyond the bound.

When not to use
    Where steps must be short: a singular value decomposition an axis, layer and step costs more than the gradient
    does. `asi` follows the same subspaces at a small part of the cost, in a size known beforehand.

Reference
    Nguyen, Quelennec, Nguyen, Tartaglione and Nguyen, "Activation Map Compression through Tensor Decomposition for
    Deep Learning", NeurIPS 2024. There all axes are decomposed from x as it was; here each after those before it were
    cut (Vannieuwenhoven, Vandebril and Meerbergen, SIAM J. Sci. Comput. 34, 2012), which is cheaper and loses no more.
    The released code pads both axes by the first padding, and has no gradient for groups; here every geometry works.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pydantic import Field

from edgetune.contract import Kept, Tensors
from edgetune.hosts.factored import FactoredMethod, whole, working
from edgetune.hosts.tucker import Ranks, truncated_hosvd, tucker_size
from edgetune.overlap import ConvGeometry

PARTS = 1024
"""In how many steps ranks are cut."""


class HOSVD(FactoredMethod):
    """`energy`: the share of the squared norm that is kept, axis by axis; `most`: the largest share of numbers kept."""

    method = "hosvd"

    energy: float = Field(0.8, gt=0, le=1, description="share of the squared norm of x kept, axis by axis")
    most: float = Field(0.5, gt=0, le=1, description="kept numbers, at most this share of the numbers of x")

    @property
    def label(self) -> str:
        return f"hosvd, {100 * self.energy:.3g} % energy"

    def bound(self, shape: torch.Size) -> int:
        """The most numbers that are kept of a map of `shape` (n c h w)."""
        return min(math.prod(shape), max(int(self.most * math.prod(shape)), tucker_size(shape, (1, 1, 1, 1))))

    def keep(self, x: torch.Tensor, geometry: ConvGeometry, state: Tensors) -> Kept:
        bound = self.bound(x.shape)
        if x.is_meta:  # memory of the bound's size, seen as the whole map
            return whole(x.new_empty(bound)[:1].expand(x.shape) if bound else x)
        values = working(x)
        if not x.numel() or not bool(values.isfinite().all()):
            return whole(x)
        factors = truncated_hosvd(values, self.energy)
        if factors.numel > bound:
            factors = truncated_hosvd(values, self.energy, ranks_within(x.shape, factors.core.shape, bound))
        return whole(x) if factors.numel >= x.numel() else factors.to(x.dtype).kept()


def ranks_within(shape: Sequence[int], ranks: Sequence[int], bound: int) -> Ranks:
    """The ranks cut by one ratio, the largest found with which factors of `shape` have at most `bound` numbers."""
    low, high = 0, PARTS
    while high - low > 1:
        middle = (low + high) // 2
        fits = tucker_size(shape, _cut(ranks, middle)) <= bound
        low, high = (middle, high) if fits else (low, middle)
    return _cut(ranks, low)


def _cut(ranks: Sequence[int], parts: int) -> Ranks:
    n, c, h, w = (max(1, rank * parts // PARTS) for rank in ranks)
    return n, c, h, w
