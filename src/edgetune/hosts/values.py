"""The values inside a segment: which may be overwritten, through which a gradient flows, how large they are."""

from __future__ import annotations

from edgetune.contract import Needs, Segment, Tensors
from edgetune.hosts.grid import PIXEL

_FRESH = frozenset({"conv", "norm", "activation", "add"})


def owned_values(segment: Segment) -> frozenset[str]:
    """Values that the segment itself has made and only one call reads: that call may work in place."""
    return frozenset(call.node for call in segment.calls
                     if call.kind in _FRESH and len(call.consumers) == 1 and call.node not in segment.outputs)


def live_values(segment: Segment, needs: Needs) -> frozenset[str]:
    """The values through which a wanted gradient flows."""
    live = {node for node, wanted in zip(segment.inputs, needs.inputs, strict=True) if wanted}
    for call in segment.calls:
        if any(node in live for node in call.inputs) or needs.params & set(call.params.values()):
            live.add(call.node)
    return frozenset(live)


def map_sizes(segment: Segment, kept: Tensors) -> dict[str, tuple[int, int]]:
    """Rows and columns of every value, from those of the inputs."""
    sizes: dict[str, tuple[int, int]] = {}
    for node in segment.inputs:
        shape = kept[f"size:{node}"].shape
        sizes[node] = (int(shape[0]), int(shape[1]))
    for call in segment.calls:
        size = sizes[call.inputs[0]]
        if call.geometry is not None:
            size = call.geometry.at(*size).out_hw
        elif call.kind == "scale":
            size = max(size, sizes[call.inputs[1]])
        sizes[call.node] = PIXEL if call.kind == "mean" else size
    return sizes
