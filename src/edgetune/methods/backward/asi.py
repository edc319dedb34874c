"""ASI: convolution inputs kept as factors of fixed ranks, which follow them from step to step.

What it does
    Every axis of a learning convolution's input has a basis of fixed rank. A step improves the basis of the step before
    by one subspace iteration, U = QR(A A^T U) with A the input unfolded along the axis, multiplies the input with it,
    and goes on to the next axis with what is left, in the order that takes the fewest products. As networks change
    slowly, bases stay near those of a full decomposition. The weight gradient is computed from core and bases; the
    input is never made whole again.
    `edgetune.lowrank.choose_ranks` finds ranks for a budget.

Shapes
    x (n c h w), weight (o i u v), gy (n o h' w'); kept core (a b d e) and bases n (n a), c (c b), h (h d), w (w e)
    buffers asi_n, asi_c, asi_h, asi_w of the layer: the bases of the last step, float32, not in its state_dict

What is kept (bytes)
    4 (a b d e + n a + c b + h d + w e), where an axis kept whole has no basis. A rank is at most the size of its axis,
    and the product of the other ranks, as no core has more. Where factors would be no smaller than x, x itself is kept.
    Between steps the buffers hold 4 (n a + c b + h d + w e) beside the parameters.

What changes in the gradient or the answer
    gx is exact; gw is that of x projected on the bases. With full ranks gw is exact. The first step starts at random
    bases, the same ones every time. Batches and maps of another size than the last one's are taken: rows and
    columns of the bases are cut, or added from the random ones. An axis that was whole on the traced map, and is
    not on this one, starts at random every step. Where x is zero or not finite, the bases of the last
    step stay.

When not to use
    For inputs with few values, such as those of a squeeze-and-excite branch, and where ranks must be so small that
    most of the gradient is lost: compare with gradient_filter and sparse_update at the same bytes.

Reference
    Nguyen, Quelennec, Tartaglione and Nguyen, "Beyond Low-rank Decomposition: A Shortcut Approach for Efficient
    On-Device Learning", ICML 2025. There every axis is iterated on the whole input; here on what the axes before it
    left, which costs less, and a little of the old basis is added before QR, so that directions which x lacks stay as
    they were. The released code needs batches of one size; here a short last batch is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from pydantic import Field

from edgetune.contract import Kept, Tensors
from edgetune.graph import Call
from edgetune.hosts.factored import FactoredMethod, wanted_ranks, whole, working
from edgetune.hosts.tucker import (
    AXES,
    Ranks,
    Tucker,
    allowed,
    by_cost,
    folded,
    iterated,
    start,
    tucker_size,
    unfolded,
)
from edgetune.overlap import ConvGeometry


class ASI(FactoredMethod):
    """`ranks` of the axes n, c, h and w, or `shares` of their sizes."""

    method = "asi"

    ranks: Ranks | None = Field(None, description="ranks of n, c, h and w; goes before `shares`")
    shares: tuple[float, float, float, float] = Field(
        (1 / 8, 1 / 32, 1 / 2, 1 / 2), description="ranks as shares of the sizes of n, c, h and w, at least one")

    @property
    def label(self) -> str:
        given = [f"{100 * share:.3g} %" for share in self.shares] if self.ranks is None else map(str, self.ranks)
        return f"asi, {' x '.join(given)}"

    def ranks_on(self, shape: Sequence[int]) -> Ranks | None:
        """The ranks for a map of `shape` (n c h w); None where it is kept whole."""
        return _worth(tuple(shape), self._allowed_on(shape))

    def _allowed_on(self, shape: Sequence[int]) -> Ranks:
        return _allowed(tuple(shape), self.ranks, self.shares)

    def numbers(self, shape: Sequence[int]) -> int:
        """How many numbers are kept of a map of `shape` (n c h w)."""
        ranks = self.ranks_on(shape)
        return math.prod(shape) if ranks is None else tucker_size(shape, ranks)

    def state_of(self, call: Call) -> dict[str, torch.Tensor]:
        shape = call.in_shapes[0]
        ranks = self._allowed_on(shape)
        return {f"asi_{name}": start(size, rank, axis)
                for axis, (name, size, rank) in enumerate(zip(AXES, shape, ranks, strict=True)) if rank < size}

    def keep(self, x: torch.Tensor, geometry: ConvGeometry, state: Tensors) -> Kept:
        ranks = self.ranks_on(x.shape)
        if ranks is None:
            return whole(x)
        core, bases = working(x), dict[str, torch.Tensor]()
        for axis in by_cost(tuple(x.shape), ranks):
            held = state.get(f"asi_{AXES[axis]}")
            sheet = unfolded(core, axis)
            basis = iterated(sheet, _fitted(held, x, axis, ranks[axis]).to(core.dtype))
            core = folded(basis.t().mm(sheet), core, axis)
            if held is not None:
                _remember(held, basis)
            bases[AXES[axis]] = basis
        return Tucker(core, bases).to(x.dtype).kept()


@lru_cache(maxsize=4096)
def _allowed(shape: tuple[int, ...], ranks: Ranks | None, shares: tuple[float, ...]) -> Ranks:
    n, c, h, w = wanted_ranks(shape, ranks, shares)
    return allowed(shape, (n, c, h, w))


@lru_cache(maxsize=4096)
def _worth(shape: tuple[int, ...], ranks: Ranks) -> Ranks | None:
    """The ranks, where factors of them are smaller than the map."""
    return ranks if tucker_size(shape, ranks) < math.prod(shape) else None


def _fitted(held: torch.Tensor | None, x: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """The basis held for an axis of x, its rows and columns cut, or added from the start, to (size rank)."""
    shape = (x.shape[axis], rank)
    if held is not None and held.shape == shape:
        return held
    fresh = start(*shape, axis).to(x.device)
    if held is not None:
        rows, columns = min(shape[0], held.shape[0]), min(rank, held.shape[1])
        fresh[:rows, :columns] = held[:rows, :columns]
    return fresh


def _remember(buffer: torch.Tensor, basis: torch.Tensor) -> None:
    """A copy: what is kept for backward must not change when the next forward comes first."""
    if buffer.shape == basis.shape:
        buffer.copy_(basis)
    else:
        buffer.data = basis.to(buffer.dtype, copy=True)
