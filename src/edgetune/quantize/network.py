"""The integer network as a torch module that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.contract import Segment
from edgetune.errors import ModelError, PlanError, Refusal
from edgetune.graph import Call
from edgetune.hosts.segment import runner
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.quantize import integer
from edgetune.quantize.record import (
    BIAS_LIMIT,
    INPUT,
    WEIGHT_LIMIT,
    Add,
    AnyLayer,
    Conv,
    Linear,
    Mean,
    Pad,
    Quantization,
    Quantized,
    QuantizedGraph,
    Subsample,
)
from edgetune.quantize.rules import AddRule, ConvRule, FloatRule, MeanRule, PadRule, SubsampleRule, handle
from edgetune.quantize.weights import Held, Rounded, Windowed

Learns = Mapping[str, tuple[str | SparseUpdate, ...]]
"""Layer name -> the roles ("weight", "bias") that learn, as in a plan; a window of channels may stand for "weight"."""


class Map(NamedTuple):
    """A map between layers (n c h w): its int8 numbers, and the handle that its gradient goes to."""

    handle: torch.Tensor
    integers: torch.Tensor


class QuantizedNetwork(nn.Module):
    """x (n c h w) float, preprocessed -> logits (n classes), computed in integers up to the float head.

    `learns` says which weights and biases learn; what it leaves out is frozen, and nothing is kept in front of the
    first layer that learns. `state` is how a convolution's learning numbers are held between steps: `Rounded` (float)
    or `Stepped` (int8). Maps travel as int8, and their gradients are of the type of x. Raises PlanError for layers or
    roles that are not there, Refusal for a window that a layer has not.
    """

    def __init__(self, quantized: Quantized, learns: Learns | None = None, state: type[Held] = Rounded) -> None:
        super().__init__()
        self.graph, learns = quantized.graph, learns or {}
        _check(self.graph, learns)
        self.steps = nn.ModuleList()
        for layer in self.graph.layers:
            sources = tuple(self.graph.quantization(name) for name in layer.sources)
            tensors = {key.rpartition(".")[2]: tensor for key, tensor in quantized.tensors.items()
                       if key.rpartition(".")[0] == layer.name}
            self.steps.append(_MODULES[type(layer)](layer, sources, tensors, learns.get(layer.name, ()), state))
        self.over = last_read(self.graph)
        last = self.graph.layers[-1]
        self.floats = None if isinstance(last, Linear) else _runner(FloatRule(last.out), last, ())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1:] != self.graph.input_shape[1:]:
            raise ModelError(f"the network is quantized for pictures {self.graph.input_shape[1:]} and was given "
                             f"{tuple(x.shape[1:])}: resize them, or quantize for that size")
        picture = integer.quantize(x.detach(), self.graph.input).to(torch.int8)
        maps: dict[str, Any] = {INPUT: Map(handle(x.shape, x.detach()), picture)}
        del picture
        for layer, step, over in zip(self.graph.layers, self.steps, self.over, strict=True):
            maps[layer.name] = step(*(maps[name] for name in layer.sources))
            for name in over:
                del maps[name]
        result = maps.popitem()[1]
        return self.floats(*result) if self.floats else result

    def convs(self) -> Iterator[QuantizedConv]:
        """The modules of the convolutions, in order."""
        return (step for step in self.steps if isinstance(step, QuantizedConv))

    def quantized(self) -> Quantized:
        """The network as a record again, with what it has learned."""
        tensors: dict[str, torch.Tensor] = {}
        for layer, step in zip(self.graph.layers, self.steps, strict=True):
            if isinstance(step, (QuantizedConv, Head)):
                tensors |= {f"{layer.name}.{role}": tensor for role, tensor in step.tensors().items()}
        return Quantized(self.graph, tensors)


def last_layers(graph: QuantizedGraph, weights: int, biases: int | None = None) -> dict[str, tuple[str, ...]]:
    """What learns when the head, the biases of the last `biases` convolutions and the last `weights` weights do.

    `biases` is as many as `weights` unless given.
    """
    names = [conv.name for conv in graph.convs][::-1]
    biases = weights if biases is None else biases
    learns = {name: (("weight",) if i < weights else ()) + (("bias",) if i < biases else ())
              for i, name in enumerate(names[:max(weights, biases)])}
    head = graph.layers[-1]
    return learns | ({head.name: ("weight", "bias")} if isinstance(head, Linear) else {})


def last_read(graph: QuantizedGraph) -> tuple[frozenset[str], ...]:
    """For each layer, the maps that no later one reads: they can be let go of once it has run."""
    last = {name: index for index, layer in enumerate(graph.layers) for name in layer.sources}
    return tuple(frozenset(name for name, at in last.items() if at == index) for index in range(len(graph.layers)))


class QuantizedConv(nn.Module):
    """One integer convolution; `weight_scale` and `input_scale` say what its integers mean."""

    multiplier: torch.Tensor
    shift: torch.Tensor
    weight_scale: torch.Tensor
    gain: torch.Tensor

    def __init__(self, layer: Conv, sources: tuple[Quantization, ...], tensors: dict[str, torch.Tensor],
                 learns: tuple[str | SparseUpdate, ...], state: type[Held]) -> None:
        super().__init__()
        self.input_scale = sources[0].scale
        method = next((role for role in learns if isinstance(role, SparseUpdate)), None)
        self.weight = (Windowed(tensors["weight"], WEIGHT_LIMIT, method, layer.geometry, state) if method else
                       (state if "weight" in learns else Held)(tensors["weight"], WEIGHT_LIMIT))
        self.bias = (state if "bias" in learns else Held)(tensors["bias"], BIAS_LIMIT)
        self.register_buffer("weight_scale", tensors["weight_scale"].clone(), persistent=False)
        self.register_buffer("gain", tensors["gain"].clone(), persistent=False)
        multiplier, shift = integer.fixed_point(self.input_scale * self.weight_scale / layer.out.scale)
        self.register_buffer("multiplier", multiplier.to(torch.int32), persistent=False)
        self.register_buffer("shift", shift.to(torch.int8), persistent=False)
        params = tuple({**self.weight.operands("weight"), **self.bias.operands("bias"), **self._scales()})
        small = None
        if not learns:
            small = integer.fits_float32(tensors["weight"], tensors["bias"], sources[0].zero_point)
        self.run = _runner(ConvRule(layer, sources[0], method or Exact(), small), layer, params)

    def _scales(self) -> dict[str, torch.Tensor]:
        return {"weight_scale": self.weight_scale, "multiplier": self.multiplier, "shift": self.shift}

    def forward(self, x: Map) -> Map:
        return Map(*self.run(*x, *self.weight.operands("weight").values(), *self.bias.operands("bias").values(),
                             *self._scales().values()))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the record holds of this layer."""
        return {"weight": self.weight.integers(), "bias": self.bias.integers(),
                "weight_scale": self.weight_scale.clone(), "gain": self.gain.clone()}


class Unlearned(nn.Module):
    """An integer step without parameters."""

    def __init__(self, layer: Add | Mean | Subsample | Pad, sources: tuple[Quantization, ...], *_: Any) -> None:
        super().__init__()
        self.run = _runner(_unlearned(layer, sources), layer, ())

    def forward(self, *xs: Map) -> Map:
        return Map(*self.run(*(x.handle for x in xs), *(x.integers for x in xs)))


def _unlearned(layer: Add | Mean | Subsample | Pad, sources: tuple[Quantization, ...]) -> Any:
    match layer:
        case Add():
            return AddRule(layer, (sources[0], sources[1]))
        case Mean():
            return MeanRule(layer, sources[0])
        case Subsample():
            return SubsampleRule(layer)
        case Pad():
            return PadRule(layer)


class Head(nn.Module):
    """The float linear layer on dequantised features."""

    def __init__(self, layer: Linear, sources: tuple[Quantization, ...], tensors: dict[str, torch.Tensor],
                 learns: tuple[str, ...], *_: Any) -> None:
        super().__init__()
        self.floats = _runner(FloatRule(sources[0]), layer, ())
        self.weight = nn.Parameter(tensors["weight"].clone(), requires_grad="weight" in learns)
        self.bias = nn.Parameter(tensors["bias"].clone(), requires_grad="bias" in learns)

    def forward(self, x: Map) -> torch.Tensor:
        return F.linear(self.floats(*x).flatten(1), self.weight, self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the record holds of this layer."""
        return {"weight": self.weight.detach().clone(), "bias": self.bias.detach().clone()}


_MODULES: dict[type[Any], Any] = {Conv: QuantizedConv, Linear: Head,
                                  **dict.fromkeys((Add, Mean, Subsample, Pad), Unlearned)}


def _runner(rule: Any, layer: AnyLayer, params: tuple[str, ...]) -> Any:
    """The step as one autograd function, by the same host as every planned segment."""
    call = Call(name=layer.name, node=layer.name, kind=layer.op, function=layer.op, inputs=layer.sources)
    # two inputs may be the same map, so they are named by place
    places = range(len(layer.sources))
    inputs = (*(f"x{i}" for i in places), *(f"x{i}.integers" for i in places))
    outputs = (layer.name,) if isinstance(rule, FloatRule) else (layer.name, f"{layer.name}.integers")
    return runner(Segment(rule=rule, calls=(call,), inputs=inputs, outputs=outputs, params=params), layer.name)


def _check(graph: QuantizedGraph, learns: Learns) -> None:
    able: dict[str, AnyLayer] = {layer.name: layer for layer in graph.layers if isinstance(layer, (Conv, Linear))}
    for name, roles in learns.items():
        if name not in able:
            raise PlanError(f"layer '{name}' cannot learn, as the quantized network has no convolution or head of that "
                            f"name: choose among {', '.join(list(able)[:3])} ...")
        windows = [role for role in roles if isinstance(role, SparseUpdate)]
        odd = {role for role in roles if isinstance(role, str)} - {"weight", "bias"}
        if odd:
            raise PlanError(f"layer '{name}' has no '{min(odd)}' that could learn: choose weight, bias or both")
        for window in windows:
            layer = able[name]
            call = Call(name=name, node=name, kind=layer.op, function=layer.op, inputs=layer.sources,
                        geometry=layer.geometry if isinstance(layer, Conv) else None)
            if (why := window.refuse(call)) is not None:
                reason, _, way_out = why.partition(": ")
                raise Refusal(name, reason, way_out)
        if len(windows) + ("weight" in roles) > 1:
            raise PlanError(f"layer '{name}' has several shares of its weight that learn: choose one")
