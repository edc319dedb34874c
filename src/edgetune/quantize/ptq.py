"""Post-training quantization: a float network and a few batches of pictures -> the integer network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from edgetune.errors import DataError
from edgetune.graph import Graph, trace
from edgetune.quantize import record
from edgetune.quantize.fuse import Step, folded, fuse
from edgetune.quantize.ranges import MinMax, Range, Ranges, choose, watch
from edgetune.quantize.record import BIAS_LIMIT, INT8_HIGH, INT8_LOW, WEIGHT_LIMIT, Quantization, Quantized
from edgetune.recognise import MASKS

_DEAF = 1.0
"""The range given to a picture that is 0 everywhere in calibration."""


def quantize(model: nn.Module, batches: Iterable[torch.Tensor], ranges: Ranges | None = None,
             graph: Graph | None = None) -> Quantized:
    """The int8 network of `model`, whose maps range as they do on the `batches` x (n c h w), preprocessed.

    Weights are symmetric per output channel, maps per tensor; the last linear layer stays in float. `ranges` is
    MinMax() unless given. Raises Refusal naming a layer that has no integer step, DataError when there is nothing
    to calibrate with.
    """
    pictures = list(batches)
    if not pictures:
        raise DataError("there is no picture to calibrate with: give at least one batch")
    graph = graph or trace(model, pictures[0][:1])
    steps = fuse(graph)
    first = next(call.node for call in graph.calls if call.kind == "input")
    seen = watch(model, pictures, {first, *(step.node for step in steps)}, ranges or MinMax())
    builder = _Builder(model, seen, choose(seen[first], 0.0, _DEAF))
    for step in steps:
        _BUILD[step.call.kind](builder, step)
    n, c, h, w = graph.input_shape
    header = record.QuantizedGraph(input_shape=(n, c, h, w), input=builder.maps[record.INPUT],
                                   layers=tuple(builder.layers))
    return Quantized(header, builder.tensors)


@dataclass
class _Builder:
    """What has been built so far: layers in order, their tensors, how each map is read."""

    model: nn.Module
    seen: dict[str, Range]
    picture: Quantization
    layers: list[record.AnyLayer] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.maps = {record.INPUT: self.picture}

    def put(self, layer: record.AnyLayer) -> None:
        self.layers.append(layer)
        if not isinstance(layer, record.Linear):
            self.maps[layer.name] = layer.out

    def out(self, step: Step, floor: float) -> Quantization:
        """The scale of what a step makes; a map that calibration saw only as 0 gets the range of what it reads."""
        widest = max(self.maps[name].scale for name in step.sources)
        return choose(self.seen[step.node], floor, widest * (INT8_HIGH - INT8_LOW))


def _conv(builder: _Builder, step: Step) -> None:
    geometry = step.call.geometry
    assert geometry is not None
    source = builder.maps[step.sources[0]]
    weight, bias, gain = folded(builder.model, step)
    scale = weight_scales(weight, bias, source.scale)
    out = builder.out(step, source.scale * float(scale.max()))
    integers = (weight / scale.view(-1, 1, 1, 1)).round().clamp(-WEIGHT_LIMIT, WEIGHT_LIMIT)
    builder.tensors |= {f"{step.name}.weight": integers.to(torch.int8),
                        f"{step.name}.bias": (bias / (scale * source.scale)).round().to(torch.int32),
                        f"{step.name}.weight_scale": scale, f"{step.name}.gain": gain}
    low, high = _clamp(step, out)
    builder.put(record.Conv(name=step.name, sources=step.sources, shape=_shape(step), out=out, low=low, high=high,
                            geometry=geometry))


def weight_scales(weight: torch.Tensor, bias: torch.Tensor, input_scale: float) -> torch.Tensor:
    """One scale per filter, float64 (o): the largest magnitude becomes 127, and the bias stays within its limit.

    A filter of zeros takes the coarsest scale of its layer.
    """
    scale = weight.abs().flatten(1).amax(1) / WEIGHT_LIMIT
    # rounding up to the limit is fine, past it is not
    scale = torch.maximum(scale, bias.abs() / (input_scale * (BIAS_LIMIT - 1)))
    coarsest = float(scale.max()) or 1 / WEIGHT_LIMIT
    return torch.where(scale == 0, coarsest, scale)


def _add(builder: _Builder, step: Step) -> None:
    coarser = max(builder.maps[name].scale for name in step.sources)
    out = builder.out(step, coarser * 2**-16)  # well within the bits that an add's operands gain
    low, high = _clamp(step, out)
    builder.put(record.Add(name=step.name, sources=step.sources, shape=_shape(step), out=out, low=low, high=high))


def _mean(builder: _Builder, step: Step) -> None:
    pixels = step.call.in_shapes[0][2] * step.call.in_shapes[0][3]
    out = builder.out(step, builder.maps[step.sources[0]].scale / pixels)
    channels = step.call.in_shapes[0][1]
    builder.put(record.Mean(name=step.name, sources=step.sources, shape=(channels, 1, 1), out=out))


def _subsample(builder: _Builder, step: Step) -> None:
    facts = step.call.attributes
    builder.put(record.Subsample(name=step.name, sources=step.sources, shape=_shape(step),
                                 out=builder.maps[step.sources[0]],
                                 stride=(int(facts["stride_h"] or 1), int(facts["stride_w"] or 1))))


def _pad(builder: _Builder, step: Step) -> None:
    facts = step.call.attributes
    builder.put(record.Pad(name=step.name, sources=step.sources, shape=_shape(step),
                           out=builder.maps[step.sources[0]],
                           before=int(facts["before"] or 0), after=int(facts["after"] or 0)))


def _linear(builder: _Builder, step: Step) -> None:
    weight, bias, _ = folded(builder.model, step)
    builder.tensors |= {f"{step.name}.weight": weight.float(), f"{step.name}.bias": bias.float()}
    builder.put(record.Linear(name=step.name, sources=(step.sources[0],), in_features=weight.shape[1],
                              out_features=weight.shape[0]))


def _clamp(step: Step, out: Quantization) -> tuple[int, int]:
    """The integers that a ReLU's bounds become."""
    if step.activation is None:
        return INT8_LOW, INT8_HIGH
    low, high = MASKS[step.activation.function]
    ceiling = INT8_HIGH if math.isinf(high) else min(INT8_HIGH, out.zero_point + round(high / out.scale))
    return max(INT8_LOW, out.zero_point + round(low / out.scale)), ceiling


def _shape(step: Step) -> tuple[int, int, int]:
    _, channels, height, width = step.call.out_shape
    return channels, height, width


_BUILD: dict[str, Callable[[_Builder, Step], None]] = {
    "conv": _conv, "add": _add, "mean": _mean, "subsample": _subsample, "pad": _pad, "linear": _linear}
