"""The integer network as a torch module that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.contract import Segment
from edgetune.errors import ModelError, PlanError
from edgetune.graph import Call
from edgetune.hosts.segment import runner
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
from edgetune.quantize.rules import AddRule, ConvRule, MeanRule
from edgetune.quantize.weights import Held, Rounded

Learns = Mapping[str, tuple[str, ...]]
"""Layer name -> the roles ("weight", "bias") that learn, as in a plan."""


class QuantizedNetwork(nn.Module):
    """x (n c h w) float, preprocessed -> logits (n classes), computed in integers up to the float head.

    `learns` says which weights and biases learn; what it leaves out is frozen, and nothing is kept in front of the
    first layer that learns. `state` is how a convolution's learning numbers are held between steps: `Rounded` (float)
    or `Stepped` (int8). Raises PlanError for layers or roles that are not there.
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1:] != self.graph.input_shape[1:]:
            raise ModelError(f"the network is quantized for pictures {self.graph.input_shape[1:]} and was given "
                             f"{tuple(x.shape[1:])}: resize them, or quantize for that size")
        maps = {INPUT: integer.quantize(x.detach(), self.graph.input)}
        for layer, step, over in zip(self.graph.layers, self.steps, self.over, strict=True):
            maps[layer.name] = step(*(maps[name] for name in layer.sources))
            for name in over:
                del maps[name]
        last = self.graph.layers[-1]
        return maps[last.name] if isinstance(last, Linear) else integer.dequantize(maps[last.name], last.out)

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

    scale: torch.Tensor
    multiplier: torch.Tensor
    shift: torch.Tensor
    weight_scale: torch.Tensor
    gain: torch.Tensor

    def __init__(self, layer: Conv, sources: tuple[Quantization, ...], tensors: dict[str, torch.Tensor],
                 learns: tuple[str, ...], state: type[Held]) -> None:
        super().__init__()
        self.input_scale = sources[0].scale
        self.weight = (state if "weight" in learns else Held)(tensors["weight"], WEIGHT_LIMIT)
        self.bias = (state if "bias" in learns else Held)(tensors["bias"], BIAS_LIMIT)
        scale = sources[0].scale * tensors["weight_scale"] / layer.out.scale
        multiplier, shift = integer.fixed_point(scale)
        for name, buffer in (("weight_scale", tensors["weight_scale"].clone()), ("gain", tensors["gain"].clone()),
                             ("scale", scale), ("multiplier", multiplier), ("shift", shift)):
            self.register_buffer(name, buffer, persistent=False)
        params = tuple({**self.weight.operands("weight"), **self.bias.operands("bias"), **self._scales()})
        self.run = _runner(ConvRule(layer, sources[0]), layer, params)

    def _scales(self) -> dict[str, torch.Tensor]:
        return {"scale": self.scale, "multiplier": self.multiplier, "shift": self.shift}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.run(x, *self.weight.operands("weight").values(), *self.bias.operands("bias").values(),
                                   *self._scales().values())
        return y

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the record holds of this layer."""
        return {"weight": self.weight.integers(), "bias": self.bias.integers(),
                "weight_scale": self.weight_scale.clone(), "gain": self.gain.clone()}


class Joined(nn.Module):
    """An integer step without parameters: an add or a mean."""

    def __init__(self, layer: Add | Mean, sources: tuple[Quantization, ...], *_: Any) -> None:
        super().__init__()
        rule = AddRule(layer, (sources[0], sources[1])) if isinstance(layer, Add) else MeanRule(layer, sources[0])
        self.run = _runner(rule, layer, ())

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.run(*xs)
        return y


class Moved(nn.Module):
    """A step that only moves integers, so that stock autograd keeps nothing for it."""

    def __init__(self, layer: Subsample | Pad, sources: tuple[Quantization, ...], *_: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.layer, Subsample):
            rows, columns = self.layer.stride
            return x[:, :, ::rows, ::columns].contiguous()  # a view would hold on to the whole map
        return F.pad(x, (0, 0, 0, 0, self.layer.before, self.layer.after), value=self.layer.out.zero_point)


class Head(nn.Module):
    """The float linear layer on dequantised features."""

    def __init__(self, layer: Linear, sources: tuple[Quantization, ...], tensors: dict[str, torch.Tensor],
                 learns: tuple[str, ...], *_: Any) -> None:
        super().__init__()
        self.source = sources[0]
        self.weight = nn.Parameter(tensors["weight"].clone(), requires_grad="weight" in learns)
        self.bias = nn.Parameter(tensors["bias"].clone(), requires_grad="bias" in learns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(integer.dequantize(x, self.source).flatten(1), self.weight, self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the record holds of this layer."""
        return {"weight": self.weight.detach().clone(), "bias": self.bias.detach().clone()}


_MODULES: dict[type[Any], Any] = {Conv: QuantizedConv, Add: Joined, Mean: Joined, Subsample: Moved, Pad: Moved,
                                  Linear: Head}


def _runner(rule: Any, layer: Conv | Add | Mean, params: tuple[str, ...]) -> Any:
    """The step as one autograd function, by the same host as every planned segment."""
    call = Call(name=layer.name, node=layer.name, kind=layer.op, function=layer.op, inputs=layer.sources)
    # two inputs may be the same map, so they are named by place
    inputs = tuple(f"x{i}" for i in range(len(layer.sources)))
    return runner(Segment(rule=rule, calls=(call,), inputs=inputs, outputs=(layer.name,), params=params), layer.name)


def _check(graph: QuantizedGraph, learns: Learns) -> None:
    able: dict[str, AnyLayer] = {layer.name: layer for layer in graph.layers if isinstance(layer, (Conv, Linear))}
    for name, roles in learns.items():
        if name not in able:
            raise PlanError(f"layer '{name}' cannot learn, as the quantized network has no convolution or head of that "
                            f"name: choose among {', '.join(list(able)[:3])} ...")
        odd = set(roles) - {"weight", "bias"}
        if odd:
            raise PlanError(f"layer '{name}' has no '{min(odd)}' that could learn: choose weight, bias or both")
