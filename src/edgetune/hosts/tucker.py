"""Maps as a small core and a basis for each axis (Tucker factors), and how they are found.

    x[n c h w]  ~  sum_{abde} core[a b d e] n[n a] c[c b] h[h d] w[w e]

Bases have orthonormal columns. An axis that is not made smaller has no basis: the core has it whole, so that nothing is
computed or kept for it. Axes are numbered 0 to 3 and named n c h w.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

AXES = ("n", "c", "h", "w")
Ranks = tuple[int, int, int, int]
"""How many columns the basis of each axis has."""
SHIFT = 1e-6
"""How much of the old basis an iteration adds, relative to the new one: what x does not reach stays as it was."""


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


def product(x: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """matrix (r s) times the axis of size s: of x (n c h w) that axis becomes r long. Strides may be any."""
    if axis == 1:  # what a convolution does, in any layout and without a copy of x
        return F.conv2d(x, matrix[:, :, None, None])
    order = [axis, *_others(x, axis)]
    out = matrix @ x.permute(order).reshape(x.shape[axis], -1)
    return out.view(-1, *(x.shape[other] for other in order[1:])).permute([order.index(at) for at in range(4)])


def unfolded(x: torch.Tensor, axis: int, like: torch.Tensor | None = None) -> torch.Tensor:
    """x (n c h w) as a matrix (s, all others) of that axis, the others in the order in which they lie in memory (of
    `like`): for axis 0 of a dense map a view."""
    return x.permute([axis, *_others(x if like is None else like, axis)]).reshape(x.shape[axis], -1)


def _others(x: torch.Tensor, axis: int) -> list[int]:
    strides = x.stride()
    return sorted((at for at in range(4) if at != axis), key=lambda at: (-strides[at], at))


def tucker_size(shape: Sequence[int], ranks: Ranks) -> int:
    """How many numbers the factors of a map of `shape` (n c h w) have."""
    return math.prod(ranks) + sum(size * rank for size, rank in zip(shape, ranks, strict=True) if rank < size)


def allowed(shape: Sequence[int], ranks: Ranks) -> Ranks:
    """The ranks as far as a map of `shape` (n c h w) can have them: at least 1, at most an axis's size and what the
    others, axes before it at their rank, are together."""
    found: list[int] = []
    for axis, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
        found.append(max(1, min(rank, size, math.prod(found) * math.prod(shape[axis + 1:]))))
    return found[0], found[1], found[2], found[3]


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


def iterated(x: torch.Tensor, basis: torch.Tensor, axis: int) -> torch.Tensor:
    """One step of subspace iteration from basis (s r) towards the r leading left singular vectors of that axis of x.

    QR of A A^T U, with A the unfolding of x (n c h w) along the axis. A little of U is added: where x does not reach r
    dimensions the old columns stay, instead of any that complete the others.
    """
    small = product(x, basis.mT, axis)
    reached = unfolded(x, axis) @ unfolded(small, axis, like=x).mT
    shift = SHIFT * reached.norm() + torch.finfo(x.dtype).tiny
    return torch.linalg.qr(reached + shift * basis).Q
