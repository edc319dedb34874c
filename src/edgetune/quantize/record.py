"""The integer network as a record: what a microcontroller needs to run it, and nothing that needs torch to read.

    header    QuantizedGraph: layers in order of execution, geometry, clamps, (scale, zero point) of every map
    tensors   `<layer>.weight` int8 (o i u v), `<layer>.bias` int32 (o), `<layer>.weight_scale` float64 (o),
              `<layer>.gain` float64 (o), by which the folded norm multiplied each filter: training reads it;
              of the float head `<layer>.weight` (o i) and `<layer>.bias` (o), float32

A value is `scale * (integer - zero_point)`. Weights are symmetric per output channel, biases have the scale
`weight_scale * scale of the input`; multipliers and shifts follow from the scales (`integer.fixed_point`), so they
are not stored. One safetensors file holds both, with the header as JSON among its metadata.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch

from edgetune.errors import ModelError, WeightsError
from edgetune.overlap import ConvGeometry
from edgetune.record import Frozen, Record, atomic_write

INT8_LOW, INT8_HIGH = -128, 127
WEIGHT_LIMIT = 127
BIAS_LIMIT = 2**24
"""Largest magnitude of a bias: exact in float32 too, and 65 000 taps still fit an int32 accumulator beside it."""

INPUT, HEADER = "input", "edgetune.quantized"


class Quantization(Frozen):
    """How the int8 numbers of one map are read: value = scale * (integer - zero_point)."""

    scale: float = Field(gt=0, allow_inf_nan=False)
    zero_point: int = Field(ge=INT8_LOW, le=INT8_HIGH)


class Layer(Frozen):
    """One step: reads the maps `sources` (layer names, or "input") and makes the map `shape` (c h w)."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, int, int]
    out: Quantization


class Clamped(Layer):
    """A step that computes: its result is kept within [low, high], where a ReLU's bounds have gone."""

    low: int = Field(INT8_LOW, ge=INT8_LOW, le=INT8_HIGH)
    high: int = Field(INT8_HIGH, ge=INT8_LOW, le=INT8_HIGH)


class Conv(Clamped):
    """A convolution with its folded norm; pads with the zero point of what it reads."""

    op: Literal["conv"] = "conv"
    geometry: ConvGeometry


class Add(Clamped):
    """The sum of two maps, each with its own scale."""

    op: Literal["add"] = "add"


class Mean(Clamped):
    """The mean of each channel over the whole map: (c 1 1)."""

    op: Literal["mean"] = "mean"


class Subsample(Layer):
    """Every n-th row and column; the integers stay what they are."""

    op: Literal["subsample"] = "subsample"
    stride: tuple[int, int]


class Pad(Layer):
    """Zero channels (the zero point) before and after."""

    op: Literal["pad"] = "pad"
    before: int = Field(ge=0)
    after: int = Field(ge=0)


class Linear(Frozen):
    """The float head on dequantised, flattened (c h w) features: always the last step."""

    op: Literal["linear"] = "linear"
    name: str
    sources: tuple[str]
    in_features: int
    out_features: int


AnyLayer = Annotated[Conv | Add | Mean | Subsample | Pad | Linear, Field(discriminator="op")]


class QuantizedGraph(Record):
    """The header. `input_shape` is (n c h w); the last layer's result is the network's."""

    input_shape: tuple[int, int, int, int]
    input: Quantization
    layers: tuple[AnyLayer, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _reads_what_is_there(self) -> QuantizedGraph:
        known = {INPUT}
        for layer in self.layers:
            missing = set(layer.sources) - known
            if missing:
                raise ValueError(f"layer '{layer.name}' reads '{min(missing)}', which no layer before it makes")
            if layer.name in known:
                raise ValueError(f"two layers are called '{layer.name}'")
            known.add(layer.name)
        if any(isinstance(layer, Linear) for layer in self.layers[:-1]):
            raise ValueError("a linear layer is not the last one")
        return self

    def __getitem__(self, name: str) -> AnyLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def quantization(self, name: str) -> Quantization:
        """How the map that layer `name` makes, or "input", is read."""
        if name == INPUT:
            return self.input
        layer = self[name]
        assert not isinstance(layer, Linear)
        return layer.out

    @property
    def convs(self) -> tuple[Conv, ...]:
        """The convolutions, in the order of execution."""
        return tuple(layer for layer in self.layers if isinstance(layer, Conv))


@dataclass(frozen=True)
class Quantized:
    """A header and its tensors, checked: shapes, types and that no accumulator leaves int32.

    Raises ModelError naming the layer that does not hold.
    """

    graph: QuantizedGraph
    tensors: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        wanted = {key for layer in self.graph.layers for key in _expected(layer)}
        if wanted != set(self.tensors):
            odd = min(wanted ^ set(self.tensors))
            raise ModelError(f"the tensor '{odd}' is {'missing' if odd in wanted else 'one too many'}: "
                             "tensors and layers must belong to the same quantized network")
        for layer in self.graph.layers:
            self._check(layer)

    def _check(self, layer: AnyLayer) -> None:
        for key, (dtype, shape) in _expected(layer).items():
            tensor = self.tensors[key]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ModelError(f"the tensor '{key}' is {tensor.dtype} {tuple(tensor.shape)} where {dtype} {shape} "
                                 "is meant: quantize the network anew")
        if isinstance(layer, Conv):
            taps = self.tensors[f"{layer.name}.weight"][0].numel()
            limit = int(self.tensors[f"{layer.name}.bias"].abs().max())
            if limit > BIAS_LIMIT or taps * WEIGHT_LIMIT * 255 + BIAS_LIMIT >= 2**31 - 128:
                raise ModelError(f"layer '{layer.name}' can leave a 32-bit accumulator ({taps} taps, bias up to "
                                 f"{limit}): split the layer, or leave the network in float")

    def digest(self) -> str:
        """A short hash of header and tensors."""
        told = hashlib.sha256(self.graph.model_dump_json().encode())
        for key in sorted(self.tensors):
            told.update(self.tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return told.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in self.tensors.items()}
        atomic_write(path, safetensors_torch.save(whole, {HEADER: self.graph.model_dump_json()}))

    @classmethod
    def load(cls, path: str | Path) -> Quantized:
        """Read back what `save` wrote. Raises WeightsError naming the file and what is wrong with it."""
        try:
            with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
                header = (file.metadata() or {}).get(HEADER)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            if header is None:
                raise ValueError("it holds no quantized network")
            return cls(QuantizedGraph.model_validate_json(header), tensors)
        except (SafetensorError, OSError, ValueError, ValidationError, ModelError) as failure:
            raise WeightsError(f"'{path}' cannot be read as a quantized network ({str(failure).splitlines()[0]}): "
                               "give a file that edgetune quantized") from failure


def _expected(layer: AnyLayer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor that a layer has."""
    if isinstance(layer, Conv):
        geometry = layer.geometry
        weight = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
        return {f"{layer.name}.weight": (torch.int8, weight), f"{layer.name}.bias": (torch.int32, weight[:1]),
                f"{layer.name}.weight_scale": (torch.float64, weight[:1]),
                f"{layer.name}.gain": (torch.float64, weight[:1])}
    if isinstance(layer, Linear):
        return {f"{layer.name}.weight": (torch.float32, (layer.out_features, layer.in_features)),
                f"{layer.name}.bias": (torch.float32, (layer.out_features,))}
    return {}
