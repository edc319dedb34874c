"""Which layers of an integer network a small program runs as one, so that the maps between them never exist whole.

    convolution - depthwise convolution - pointwise convolution (- add of the stage's own input)
    pointwise convolution - global mean

Only where nobody else reads what is between. All other layers are stages of their own.
"""

from __future__ import annotations

from edgetune.overlap import ConvGeometry
from edgetune.quantize.record import Add, AnyLayer, Conv, Mean, QuantizedGraph

Stage = tuple[AnyLayer, ...]


def stages(graph: QuantizedGraph, streams: bool) -> tuple[Stage, ...]:
    """The layers in order, those that run as one together."""
    found: list[Stage] = []
    layers = list(graph.layers)
    while layers:
        stage = _stage(graph, layers) if streams else (layers[0],)
        found.append(stage)
        del layers[:len(stage)]
    return tuple(found)


def _stage(graph: QuantizedGraph, layers: list[AnyLayer]) -> Stage:
    head, *rest = layers[:4]
    if not isinstance(head, Conv) or not rest or _readers(graph, head.name) != [rest[0].name]:
        return (head,)
    second = rest[0]
    if isinstance(second, Mean) and _pointwise(head):
        return head, second
    if len(rest) < 2 or not (isinstance(second, Conv) and _same_channels(second.geometry)
                             and head.geometry.groups == 1 and _readers(graph, second.name) == [rest[1].name]
                             and _pointwise(rest[1])):
        return (head,)
    last = rest[2] if len(rest) == 3 else None
    residual = (isinstance(last, Add) and _readers(graph, rest[1].name) == [last.name]
                and sorted(last.sources) == sorted((rest[1].name, head.sources[0])))
    return (head, second, rest[1], *([last] if residual and last else []))


def _readers(graph: QuantizedGraph, name: str) -> list[str]:
    return [layer.name for layer in graph.layers for source in layer.sources if source == name]


def _pointwise(layer: AnyLayer) -> bool:
    return isinstance(layer, Conv) and (layer.geometry.kernel, layer.geometry.stride, layer.geometry.groups,
                                        layer.geometry.pads) == ((1, 1), (1, 1), 1, (0, 0, 0, 0))


def _same_channels(geometry: ConvGeometry) -> bool:
    return geometry.depthwise and geometry.out_channels == geometry.in_channels


def fits_in_place(stage: Stage, in_row: int, out_row: int) -> bool:
    """Whether row r of the result, `out_row` bytes, may lie over rows of the input, `in_row` bytes, for every r.

    Before row r is written, the depthwise kernel's rows are there; input rows above the next that is to be convolved
    are read for the last time, but for the row that a residual add still needs.
    """
    first, depthwise = (layer.geometry for layer in stage[:2] if isinstance(layer, Conv))
    for row in range(depthwise.out_hw[0]):
        ahead = depthwise.stride[0] * row - depthwise.pads[0] + depthwise.dilation[0] * (depthwise.kernel[0] - 1) + 1
        hidden = min(first.out_hw[0], max(0, ahead))
        free = first.in_hw[0]
        if hidden < first.out_hw[0]:
            free = min(free, max(0, first.stride[0] * hidden - first.pads[0]))
        if len(stage) == 4:
            free = min(free, row + 1)
        if (row + 1) * out_row > free * in_row:
            return False
    return True
