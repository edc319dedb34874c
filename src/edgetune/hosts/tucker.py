"""Maps as a small core and a basis for each axis (Tucker factors), and how they are found.

    x[n c h w]  ~  sum_{abde} core[a b d e] n[n a] c[c b] h[h d] w[w e]

Bases have orthonormal columns. An axis that is not made smaller has no basis: the core has it whole, so that nothing is
computed or kept for it. Axes are numbered 0 to 3 and named n c h w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

AXES = ("n", "c", "h", "w")
Ranks = tuple[int, int, int, int]
"""How many columns the basis of each axis has."""
SHIFT, LEAST = 1e-6, 1e-17
"""How much of the old basis an iteration adds, relative to the new one: what x does not reach stays as it was. And in
numbers, so that nothing but the old basis is left where x reaches nothing; its square is still a float32."""


@dataclass(frozen=True)
class Tucker:
    """core (a b d e), and bases n (n a), c (c b), h (h d), w (w e) by name; axes without a basis are whole."""

    core: torch.Tensor
    bases: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, kept: Mapping[str, torch.Tensor]) -> Tucker:
        """From what `kept` gave."""
        return cls(kept["core"], {name: kept[name] for name in AXES if name in kept})

    def kept(self) -> dict[str, torch.Tensor]:
        """Core and bases by name."""
        return {"core": self.core, **self.bases}

    @property
    def numel(self) -> int:
        """Numbers in all."""
        return sum(tensor.numel() for tensor in self.kept().values())

    def to(self, dtype: torch.dtype) -> Tucker:
        """The same in another precision."""
        return Tucker(self.core.to(dtype), {name: basis.to(dtype) for name, basis in self.bases.items()})

    def grown(self, *axes: str) -> torch.Tensor:
        """The core with the given axes at full size again."""
        out = self.core
        for name in axes:
            if name in self.bases:
                out = product(out, self.bases[name], AXES.index(name))
        return out


WIDE = 64
"""From how many numbers side by side on an axis is multiplied where it lies, without bringing it to the front."""


class _Order(NamedTuple):
    """An order of the axes, and where each of them stands in it."""

    axes: tuple[int, ...]
    places: tuple[int, ...]


@lru_cache(maxsize=4096)
def _lying(strides: tuple[int, ...], first: int | None = None) -> _Order:
    """The axes as they lie in memory, but for one that comes first."""
    axes = sorted(range(4), key=lambda at: (at != first, -strides[at]))
    return _Order(tuple(axes), tuple(axes.index(at) for at in range(4)))


def unfolded(x: torch.Tensor, axis: int, like: torch.Tensor | None = None) -> torch.Tensor:
    """x (n c h w) as a matrix (s, all others) of that axis, the others in the order in which they lie in memory (of
    `like`): a view where the axis comes first or last there."""
    return x.permute(_lying((x if like is None else like).stride(), axis).axes).reshape(x.shape[axis], -1)


def folded(matrix: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """The map whose unfolding is matrix (r, all others), where x is the map that was unfolded along that axis."""
    order, shape = _lying(x.stride(), axis), x.shape
    return matrix.view(-1, *[shape[at] for at in order.axes[1:]]).permute(order.places)


def product(x: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """matrix (r s) times the axis of size s: of x (n c h w) that axis becomes r long. Strides may be any."""
    order = _lying(x.stride())
    sizes, at = [x.shape[axis] for axis in order.axes], order.places[axis]
    if at == 0 or math.prod(sizes[at + 1:]) < WIDE:
        return folded(matrix.mm(unfolded(x, axis)), x, axis)
    sheets = x.permute(order.axes).reshape(math.prod(sizes[:at]), sizes[at], -1)
    out = matrix.expand(len(sheets), *matrix.shape).bmm(sheets)
    return out.view(*sizes[:at], len(matrix), *sizes[at + 1:]).permute(order.places)


def tucker_size(shape: Sequence[int], ranks: Ranks) -> int:
    """How many numbers the factors of a map of `shape` (n c h w) have."""
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank < size)


def allowed(shape: Sequence[int], ranks: Ranks) -> Ranks:
    """The ranks as far as a map of `shape` (n c h w) can have them: at least 1, at most an axis's size and the product
    of the other ranks, which is all that an unfolding of the core can have."""
    found = [max(1, min(rank, size)) for size, rank in zip(shape, ranks, strict=True)]
    for _ in AXES:  # one rank that is cut may cut another
        for axis, rank in enumerate(found):
            found[axis] = min(rank, math.prod(found[:axis] + found[axis + 1:]))
    return found[0], found[1], found[2], found[3]


@lru_cache(maxsize=4096)
def by_cost(shape: tuple[int, ...], ranks: Ranks) -> tuple[int, ...]:
    """The axes of a map of `shape` (n c h w) that get smaller, in the order in which fewest products make the core.

    An axis of size s costs r products a number and leaves r / s of the numbers. Of two neighbours the one with the
    smaller r / (1 - r / s) goes first, whatever comes before and behind, so that the order by it is the best of all.
    """
    cost = {axis: rank * size / (size - rank)
            for axis, (size, rank) in enumerate(zip(shape, ranks, strict=True)) if rank < size}
    return tuple(sorted(cost, key=cost.__getitem__))


def truncated_hosvd(x: torch.Tensor, energy: float, ranks: Ranks | None = None) -> Tucker:
    """The smallest factors of x (n c h w) that lose, axis by axis, at most 1 - energy of its squared norm, or as little
    as `ranks` allow.

    Sequentially truncated (Vannieuwenhoven, Vandebril and Meerbergen, 2012): an axis is decomposed after those before
    it have been made smaller, so that only small matrices are; the squared losses of the axes add up exactly. The order
    is n h w c, as the channels are most, and are fewest to decompose when they come last. x is finite.
    """
    core, bases = x, dict[str, torch.Tensor]()
    total = float(x.double().square().sum())
    for name in ("n", "h", "w", "c"):
        axis = AXES.index(name)
        values, vectors = _principal(unfolded(core, axis))
        reached = values.double().clamp(min=0).cumsum(0)
        wanted = reached[-1] - (1 - energy) * total
        rank = core.shape[axis] if energy == 1 else min(int(torch.searchsorted(reached, wanted)) + 1, core.shape[axis])
        rank = rank if ranks is None else min(rank, ranks[axis])
        if rank < core.shape[axis]:
            bases[name] = vectors[:, :rank].contiguous()
            core = product(core, bases[name].mT, axis)
    return Tucker(core, bases)


def _principal(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared singular values of matrix (s t), largest first, and left singular vectors."""
    if matrix.shape[1] < matrix.shape[0]:
        vectors, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return values.square(), vectors
    values, vectors = torch.linalg.eigh(matrix @ matrix.mT)
    return values.flip(0), vectors.flip(1)


def start(size: int, rank: int, seed: int) -> torch.Tensor:
    """An orthonormal basis (s r) that depends on nothing but its shape and seed; float32, on the CPU."""
    return torch.linalg.qr(torch.randn(size, rank, generator=torch.Generator().manual_seed(seed))).Q


def iterated(sheet: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """One step of subspace iteration from basis (s r) towards the r leading left singular vectors of sheet (s t).

    QR of A A^T U. A little of U is added: where the sheet does not reach r dimensions, or is not finite, the old
    columns stay, instead of any that complete the others. The narrow matrix stands on the left of every product, where
    libraries are up to ten times faster.
    """
    reached = basis.t().mm(sheet).mm(sheet.t()).t().nan_to_num(0.0, 0.0, 0.0).add(basis, alpha=LEAST)
    norm = torch.linalg.vector_norm(reached)
    if basis.shape[1] == 1:
        return reached / norm
    return torch.linalg.qr(reached.addcmul(basis, norm, value=SHIFT)).Q
