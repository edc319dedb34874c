"""A network rewritten by methods of few bits -> the packed network, with the same answer.

Between a convolution of bits and the layers that read signs of its answer lie scale, bias, norm and clip: monotone
functions of one integer, so a threshold a filter says all of them. It is read off these functions themselves, in their
own float32 arithmetic and for every sum there can be; no formula could round otherwise. Layers of additions in integers
are those of the trained network, by the very same function. On maps every norm is the gain
and the shift that torch itself multiplies by and adds, and everything happens in torch's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.errors import ModelError, Refusal
from edgetune.graph import Call, Graph, not_finite, tensor_of, trace
from edgetune.hosts.arithmetic import ArithmeticConv2d, arithmetic_layers
from edgetune.hosts.binary import BinaryMethod
from edgetune.methods.arithmetic.quantized_adder import QuantizedAdder
from edgetune.overlap import ConvGeometry
from edgetune.packed import layers
from edgetune.packed.coding import dense_steps, encode
from edgetune.packed.fuse import Step, fuse
from edgetune.packed.layers import Window
from edgetune.packed.record import AnyLayer, Packed, PackedGraph
from edgetune.recognise import ARITHMETIC, MASKS

Made = tuple[AnyLayer, dict[str, torch.Tensor]]
"""A layer and its tensors by role."""


def pack(model: nn.Module, sample: Sequence[int] | Graph, rest: Literal["int8", "float"] = "int8") -> Packed:
    """The packed network of `model`, which has layers of few bits, as it is in evaluation mode.

    `sample` is the shape (n c h w) of an input, or the graph of the rewritten model. The weights of other
    layers become int8 with a scale a filter (`coding.rounded` gives the model that answers so), or stay as they are.
    What is summed in float (`rest`, means, the factors of `input_scale`) has the last bit that torch's own sums have,
    which may depend on the memory order of maps: here they lie channels last.
    Raises Refusal naming a layer that has no packed form, ModelError for a network without arithmetic layers.
    """
    methods = {name: layer.method for name, layer in arithmetic_layers(model).items()}
    if not methods:
        raise ModelError("the network has no layer of few bits: rewrite it by xnor, dir_net or quantized_adder first")
    _check_numbers(model)
    graph = sample if isinstance(sample, Graph) else trace(model, torch.zeros(tuple(sample)))
    builder = _Builder(model, rest)
    made = [each for step in fuse(graph, methods) for each in builder.layers_of(step)]
    n, c, h, w = graph.input_shape
    return Packed(PackedGraph(input_shape=(n, c, h, w), layers=tuple(layer for layer, _ in made)),
                  {f"{layer.name}.{role}": tensor for layer, tensors in made for role, tensor in tensors.items()})


def _check_numbers(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise ModelError(f"'{name}' is {tensor.dtype} on {tensor.device}: pack the network as "
                             "`model.float().cpu()`")
    if (broken := not_finite(model)) is not None:
        raise ModelError(f"'{broken}' has a value that is not finite: train the network anew")


class _Builder:
    """Makes layers and tensors of steps; `rest` is the coding of weights that no method has."""

    def __init__(self, model: nn.Module, rest: Literal["int8", "float"]) -> None:
        self.model, self.rest = model, rest
        self._alone: dict[str, Callable[[Step, Call], Made]] = {
            "conv": self._conv, "linear": self._linear, ARITHMETIC: self._arithmetic, "max_pool": self._max_pool,
            "mean": self._mean, "flatten": self._flatten, "subsample": self._subsample, "pad": self._pad,
            "scale": self._scale, "activation": self._smooth}

    @torch.no_grad()
    def layers_of(self, step: Step) -> Iterator[Made]:
        first = step.calls[0] if step.calls else None
        if first is None or first.kind in ("norm", "add") or first.function in MASKS:
            yield self._pointwise(step)
        elif first.kind == ARITHMETIC and not step.map:
            yield from self._run(step)
        else:
            yield self._alone[first.kind](step, first)

    def _run(self, step: Step) -> Iterator[Made]:
        """From bits to bits, with a pool of bits where there is a pool: directly behind the convolution it is one of
        sums, behind the norm one of signs."""
        first = step.calls[0]
        pool = next((call for call in step.calls if call.kind == "max_pool"), None)
        made = self._made(first)
        tensors = encode(made, "bits")
        threshold, flip = _thresholds(self.model, step.calls, tensors.pop("scale"))
        of_sums = pool is not None and pool is step.calls[1] and len(step.calls) > 2
        now = torch.zeros_like(flip) if of_sums else flip
        yield layers.BinarySign(name=first.node, sources=step.sources, geometry=_geometry(first),
                                pad_value=self._method(first).pad_value), {
            **tensors, "threshold": threshold, "flip": now}
        if pool is not None:
            later = of_sums and bool(flip.any())
            yield layers.BitPool(name=step.name, sources=(first.node + layers.BITS,), window=_window(pool),
                                 channels=step.channels, flipped=later), {"flip": flip} if later else {}

    def _arithmetic(self, step: Step, call: Call) -> Made:
        method = self._layer(call).method
        return self._adder(step, call, method) if isinstance(method, QuantizedAdder) else self._binary(step, call)

    def _adder(self, step: Step, call: Call, method: QuantizedAdder) -> Made:
        assert method.range is not None
        steps, bias = method.steps(self._layer(call).weight, method.range), self._bias(call)
        return layers.Adder(name=step.name, sources=step.sources, geometry=_geometry(call), bits=method.bits,
                            groups=len(steps.step), exact=method.exact, bias="bias" in bias), {
            "weight": dense_steps(steps.weight, method.bits), "group": steps.group.to(torch.uint8), "step": steps.step,
            "shift": steps.shift, **bias}

    def _binary(self, step: Step, call: Call) -> Made:
        """A layer of bits whose answer is a map, or one of binary weights alone."""
        method, tensors = self._method(call), encode(self._made(call), "bits") | self._bias(call)
        if not method.activations:
            return layers.Conv(name=step.name, sources=step.sources, geometry=_geometry(call), coding="bits",
                               bias="bias" in tensors), tensors
        return layers.BinaryMap(name=step.name, sources=step.sources, geometry=_geometry(call),
                                pad_value=method.pad_value, input_scale=not method.keeps_bits,
                                bias="bias" in tensors), tensors

    def _pointwise(self, step: Step) -> Made:
        norm, activation = (next((call for call in step.calls if call.kind == kind), None)
                            for kind in ("norm", "activation"))
        tensors = dict(zip(("gain", "shift"), gain_and_shift(self.model, norm), strict=True)) if norm else {}
        return layers.Pointwise(name=step.name, sources=step.sources, channels=step.channels, norm=norm is not None,
                                activation=activation.function if activation else None, map=step.map,
                                bits=step.bits), tensors

    def _conv(self, step: Step, call: Call) -> Made:
        tensors = self._weights(call)
        return layers.Conv(name=step.name, sources=step.sources, geometry=_geometry(call), coding=self.rest,
                           bias="bias" in tensors), tensors

    def _linear(self, step: Step, call: Call) -> Made:
        tensors = self._weights(call)
        out_features, in_features = tensors["weight"].shape
        return layers.Linear(name=step.name, sources=step.sources, in_features=in_features, out_features=out_features,
                             coding=self.rest, bias="bias" in tensors), tensors

    def _max_pool(self, step: Step, call: Call) -> Made:
        return layers.MaxPool(name=step.name, sources=step.sources, window=_window(call)), {}

    def _mean(self, step: Step, call: Call) -> Made:
        return layers.Mean(name=step.name, sources=step.sources, keepdim=bool(call.attributes["keepdim"])), {}

    def _flatten(self, step: Step, call: Call) -> Made:
        return layers.Flatten(name=step.name, sources=step.sources, features=step.channels), {}

    def _subsample(self, step: Step, call: Call) -> Made:
        return layers.Subsample(name=step.name, sources=step.sources, stride=_pair(call, "stride_h", "stride_w")), {}

    def _pad(self, step: Step, call: Call) -> Made:
        before, after = _pair(call, "before", "after")
        return layers.Pad(name=step.name, sources=step.sources, before=before, after=after), {}

    def _scale(self, step: Step, call: Call) -> Made:
        return layers.Scale(name=step.name, sources=step.sources), {}

    def _smooth(self, step: Step, call: Call) -> Made:
        return layers.Smooth(name=step.name, sources=step.sources, function=call.function), {}

    def _layer(self, call: Call) -> ArithmeticConv2d:
        layer = self.model.get_submodule(call.name)
        assert isinstance(layer, ArithmeticConv2d)
        return layer

    def _method(self, call: Call) -> BinaryMethod:
        method = self._layer(call).method
        assert isinstance(method, BinaryMethod)
        return method

    def _made(self, call: Call) -> torch.Tensor:
        """What a trained binary layer multiplies by: signs times one scale a filter."""
        weight = self._layer(call).weight
        return self._method(call).quantize_weight(weight, torch.ones(()))

    def _weights(self, call: Call) -> dict[str, torch.Tensor]:
        return encode(tensor_of(self.model, call.params["weight"]), self.rest) | self._bias(call)

    def _bias(self, call: Call) -> dict[str, torch.Tensor]:
        return {"bias": tensor_of(self.model, call.params["bias"]).detach().clone()} if "bias" in call.params else {}


def _thresholds(model: nn.Module, run: tuple[Call, ...], scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """From which sum on, or with flip up to which, the value behind a run is at least 0: int32 (o), bool (o).

    All functions of the run are computed for every sum, in the memory order of the maps they stand for.
    """
    products = layers.filter_shape(_geometry(run[0]))[1:]
    most = products[0] * products[1] * products[2]
    sums = torch.arange(-most, most + 1, dtype=torch.float32).view(1, 1, -1, 1)
    y = (sums * scale.view(1, -1, 1, 1)).contiguous(memory_format=torch.channels_last)
    if "bias" in run[0].params:
        y = y + tensor_of(model, run[0].params["bias"]).view(1, -1, 1, 1)
    for call in run[1:]:
        if call.kind == "norm":
            y = normalised(y, model, call)
        elif call.kind == "activation":
            y = y.clamp(*MASKS[call.function])
    reached = y[0, :, :, 0] >= 0
    flip = reached[:, 0] & ~reached[:, -1]
    reached = reached ^ flip[:, None]
    if bool((reached[:, 1:] < reached[:, :-1]).any()):
        raise Refusal(run[0].name, "has an answer whose sign comes and goes as its sums grow",
                      "look for values in its norm that are not finite")
    return (most + 1 - reached.sum(1)).to(torch.int32), flip


def normalised(x: torch.Tensor, model: nn.Module, norm: Call) -> torch.Tensor:
    """A norm of the model in evaluation mode, by torch itself: x (n c h w)."""
    mean, var, weight, bias = (tensor_of(model, norm.params[role]) if role in norm.params else None
                               for role in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, float(norm.attributes["eps"] or 0.0))


def gain_and_shift(model: nn.Module, norm: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch multiplies by and adds in a norm, float32 (c) each: its answers where one of the two is alone."""
    mean, var = (tensor_of(model, norm.params[role]) for role in ("running_mean", "running_var"))
    zeros = torch.zeros(1, len(mean), 1, 1)
    weight = tensor_of(model, norm.params["weight"]) if "weight" in norm.params else None
    gain = F.batch_norm(zeros + 1, torch.zeros_like(mean), var, weight, None, False, 0.0,
                        float(norm.attributes["eps"] or 0.0))
    return gain.flatten(), normalised(zeros, model, norm).flatten()


def _geometry(call: Call) -> ConvGeometry:
    assert call.geometry is not None
    return call.geometry


def _pair(call: Call, first: str, second: str) -> tuple[int, int]:
    return int(call.attributes[first] or 0), int(call.attributes[second] or 0)


def _window(call: Call) -> Window:
    kernel, stride, pad, dilation = (_pair(call, f"{name}_h", f"{name}_w")
                                     for name in ("kernel", "stride", "pad", "dilation"))
    return Window(kernel=kernel, stride=stride, pad=pad, dilation=dilation,
                  ceil_mode=bool(call.attributes["ceil_mode"]))
