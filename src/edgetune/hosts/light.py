"""Rules of calls without parameters that stand between layers in a run: sums, means, products, identities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edgetune.contract import Needs, Rule, Segment, Tensors
from edgetune.hosts.pointwise import Backward, Forward


class AddRule:
    """a + b of one shape: the gradient goes to both, and nothing is kept."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        return (xs[0] + xs[1],), {}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        return tuple(gys[0] if wanted else None for wanted in needs.inputs), {}


class MeanRule:
    """The mean of every map (n c h w): only the map's size is kept."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        call, x = segment.calls[0], xs[0]
        y = F.adaptive_avg_pool2d(x, 1) if call.function == "adaptive_avg_pool2d" else \
            x.mean((2, 3), keepdim=bool(call.attributes["keepdim"]))
        return (y,), {"size": x.new_empty((*x.shape, 0))}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        if gys[0] is None or not needs.inputs[0]:
            return (None,), {}
        n, c, h, w = (int(size) for size in kept["size"].shape[:4])
        return ((gys[0].reshape(n, c, 1, 1) / (h * w)).expand(n, c, h, w),), {}


class ProductRule:
    """a * b, a map and its gate in either order: each is kept for the other's gradient."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        a, b = xs
        wanted = zip(("b", "a"), (b, a), needs.inputs, strict=True)
        return (a * b,), {name: other for name, other, flag in wanted if flag} | {
            f"{name}_size": own.new_empty((*own.shape, 0)) for name, own in (("a", a), ("b", b))}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        gy = gys[0]
        if gy is None:
            return (None, None), {}
        return tuple((gy * kept[other]).sum_to_size(kept[f"{own}_size"].shape[:-1]) if wanted else None
                     for own, other, wanted in zip("ab", "ba", needs.inputs, strict=True)), {}


class IdentityRule:
    """What leaves its input as it is."""

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors, needs: Needs) -> Forward:
        return (xs[0],), {}

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> Backward:
        return (gys[0] if needs.inputs[0] else None,), {}


LIGHT: dict[str, Rule] = {"add": AddRule(), "mean": MeanRule(), "scale": ProductRule(), "identity": IdentityRule()}
"""Kind of call -> its rule."""
