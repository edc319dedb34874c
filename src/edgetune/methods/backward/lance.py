"""LANCE: convolution inputs projected on bases that are found once; only the cores are kept.

What it does
    The first `batches` batches of training are decomposed along channels, rows and columns. From then on the bases
    stay, and all that a step does is to multiply the input with them: the core is kept, the batch axis stays whole.
    The weight gradient is computed from core and bases; the input is never made whole again.

Shapes
    x (n c h w), weight (o i u v), gy (n o h' w'); kept core (n b d e)
    buffers lance_c (c b), lance_h (h d), lance_w (w e) of the layer, with the norm of each column and the count of
    batches they come from: float32, not in its state_dict

What is kept (bytes)
    4 n b d e. The bases lie in the buffers, 4 (c b + h d + w e), once for all steps. With `batches` > 1 copies of
    them are kept too while they are still being found. An axis whose rank is its size has no basis.

What changes in the gradient or the answer
    gx is exact; gw is that of x projected on the bases. With full ranks gw is exact. On a map of another size than the
    traced one, rows and columns stay whole. A batch that is zero or not finite tells nothing of bases, and does not
    count.

When not to use
    Where data drift or the network changes much while it learns, as the bases stay: `asi` follows them. With few
    samples in a micro-batch the first one says little: give `batches` more.

Reference
    Apolinario and Roy, "LANCE: Low Rank Activation Compression for Efficient On-Device Continual Learning", 2025,
    arXiv 2509.21617. There a decomposition of calibration batches comes before training; here the first batches of
    training serve, bases of several are merged by their singular values, and each is found by a few iterations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from edgetune.contract import Kept, Tensors
from edgetune.graph import Call
from edgetune.hosts.factored import FactoredMethod, wanted_ranks, whole, working
from edgetune.hosts.tucker import AXES, Tucker, iterated, product, start, unfolded
from edgetune.overlap import ConvGeometry

ITERATIONS = 8
"""Steps of subspace iteration for a batch whose bases are looked for."""


class LANCE(FactoredMethod):
    """`ranks` of the axes c, h and w, or `shares` of their sizes; `batches` that the bases come from."""

    method = "lance"

    ranks: tuple[int, int, int] | None = Field(None, description="ranks of c, h and w; goes before `shares`")
    shares: tuple[float, float, float] = Field(
        (1 / 16, 1 / 2, 1 / 2), description="ranks as shares of the sizes of c, h and w, at least one")
    batches: int = Field(1, ge=1, description="how many batches the bases come from")

    @property
    def label(self) -> str:
        given = [f"{100 * share:.3g} %" for share in self.shares] if self.ranks is None else map(str, self.ranks)
        return f"lance, {' x '.join(given)}"

    def state_of(self, call: Call) -> dict[str, torch.Tensor]:
        return self._fresh(call.in_shapes[0])

    def _fresh(self, shape: Sequence[int]) -> dict[str, torch.Tensor]:
        state, sizes = {"lance_batches": torch.zeros((), dtype=torch.long)}, shape[1:]
        for name, size, rank in zip(AXES[1:], sizes, wanted_ranks(sizes, self.ranks, self.shares), strict=True):
            if rank < size:
                state |= {f"lance_{name}": start(size, rank, AXES.index(name)),
                          f"lance_norms_{name}": torch.zeros(rank)}
        return state

    def keep(self, x: torch.Tensor, geometry: ConvGeometry, state: Tensors) -> Kept:
        if not x.numel():
            return whole(x)
        # where no one holds a state, as for a single gradient, bases are those of x
        state = state or {role: tensor.to(x.device) for role, tensor in self._fresh(x.shape).items()}
        # a run on meta tensors stands for the steps after the first ones
        learning = not x.is_meta and bool(state["lance_batches"] < self.batches)
        if learning:
            _learn(working(x), state)
        more = learning and bool(state["lance_batches"] < self.batches)
        core, bases = x, dict[str, torch.Tensor]()
        for axis, name in enumerate(AXES):
            basis = state.get(f"lance_{name}")
            if basis is not None and basis.shape[0] == x.shape[axis]:
                core = product(core, basis.to(x.dtype).mT, axis)
                bases[name] = basis.clone() if more else basis
        return Tucker(core, bases).kept()


@torch.no_grad()
def _learn(x: torch.Tensor, state: Tensors) -> None:
    """Merge the bases held with those of x (n c h w), if x tells anything."""
    norm = x.norm()
    if not bool(norm.isfinite() & (norm > 0)):
        return
    core = x
    for axis, name in enumerate(AXES):
        held = state.get(f"lance_{name}")
        if held is None or held.shape[0] != x.shape[axis]:
            continue
        basis, norms = _leading(core, held.to(core.dtype), axis)
        core = product(core, basis.mT, axis)
        before = held * state[f"lance_norms_{name}"]
        vectors, values, _ = torch.linalg.svd(torch.cat((before.to(core.dtype), basis * norms), 1), full_matrices=False)
        rank = held.shape[1]
        held.copy_(vectors[:, :rank])
        state[f"lance_norms_{name}"].copy_(values[:rank])
    state["lance_batches"].add_(1)


def _leading(x: torch.Tensor, basis: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The leading left singular vectors of an axis of x, as many as `basis` has columns, and singular values."""
    sheet = unfolded(x, axis)
    for _ in range(ITERATIONS):
        basis = iterated(sheet, basis)
    small = basis.mT @ sheet
    squares, vectors = torch.linalg.eigh(small @ small.mT)
    return basis @ vectors, squares.clamp(min=0).sqrt()
