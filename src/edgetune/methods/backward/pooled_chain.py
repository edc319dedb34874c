"""The pooled chain: gradient filtering that never leaves the patch grid.

What it does
    Gradient filtering of whole runs of convolution, norm with frozen statistics, activation, residual add, global
    mean and squeeze-excite gate. Between two convolutions the gradient is not spread to a full map and averaged
    again: it stays one value a patch, and an activation multiplies it by the share of its patch that is open. Shifts
    and scales of the norms learn inside. The result equals that of `gradient_filter` layer by layer.

Shapes
    x (n c h w); on the grid every gradient is (n c ceil(h/cell) ceil(w/cell)), cell = patch_px times the strides above

What is kept (bytes)
    Patch means of each learning convolution's input (4 n c p q, shared by convolutions that read the same map), and
    of each activation either an open count a patch (1 byte each) or one bit a value, whichever is smaller; after a
    residual add always the bits. Adds keep nothing, and norms nothing unless their scale learns: then the means over
    cells of slope times input (4 n c p q), for each run of AND-ed masks that the gradient arrives under; all of the
    input (4 n c h w) where that is no more, or where the gradient arrives pixel by pixel, as from a max-pool.

What changes in the gradient or the answer
    The forward pass does not change. Gradients equal those of gradient_filter on every layer of the run, to float
    precision: masks that multiply along identity shortcuts (ReLU after the add) are AND-ed as bits and counted a
    patch, because the mean of a product of masks is not the product of their means.

When not to use
    Max-pooling and concatenation end a run; those layers fall back to gradient filtering, layer by layer. Scales
    about double what is kept, and cost more where runs end often: there let shifts learn alone.

Reference
    Derived here from Yang et al., "Efficient On-device Training via Gradient Filtering", CVPR 2023; see
    docs/pooled_chain.md.
"""

from __future__ import annotations

from edgetune.contract import Plan, Segment
from edgetune.graph import Call, Graph
from edgetune.hosts.chain import ChainRule
from edgetune.hosts.runs import convex_runs, segment_of
from edgetune.hosts.schedule import schedule
from edgetune.methods.backward.gradient_filter import (
    GradientFilter,
    grid_backward,
    input_cell,
)
from edgetune.recognise import MASKS, SMOOTH


class PooledChain(GradientFilter):
    """Patches of `patch_px` output pixels, kept from layer to layer; `taps` mean or grid."""

    method = "pooled_chain"

    def refuse(self, call: Call) -> str | None:
        if self.bases > 1:
            return "has bases > 1 in a pooled chain, which carries patch means only: use gradient_filter there"
        return super().refuse(call)

    @classmethod
    def claim(cls, graph: Graph, plan: Plan) -> list[Segment]:
        """The longest convex runs of calls that can go backward on the grid."""
        settings = {call.node: own for call in graph.layers("conv")
                    if isinstance(own := plan.settings(call.name, cls), cls) and call.followed}
        eligible = {call.node for call in graph.calls if call.node in settings or _passes(call, graph)}
        segments: list[Segment] = []
        while True:
            runs = convex_runs(graph, eligible, anchors=set(settings))
            schedules = [schedule(run, settings, _Grid()) for run in runs]
            refused = {node for made in schedules for node in made.refused}
            if not refused:
                break
            eligible -= refused
        for run, made in zip(runs, schedules, strict=True):
            inside = {call.node: settings[call.node] for call in run if call.node in settings}
            segments.append(segment_of(run, ChainRule(made, inside, _Grid())))
        return segments


def _passes(call: Call, graph: Graph) -> bool:
    """Whether a call lets a grid gradient through."""
    if not call.followed or graph.overwrites_for_others(call):
        return False
    if call.kind == "activation":
        return call.function in MASKS or call.function in SMOOTH
    return call.kind in ("norm", "add", "mean", "scale", "identity") and len(call.out_shape) in (2, 4)


class _Grid:
    """The products of gradient filtering, as the chain's host asks for them."""

    input_cell = staticmethod(input_cell)
    gradients = staticmethod(grid_backward)
