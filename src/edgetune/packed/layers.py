"""The layers that a packed network is made of, each with the tensors it needs and the channels it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, PositiveInt, field_validator, model_validator

from edgetune.hosts.binary import layer_of
from edgetune.overlap import ConvGeometry
from edgetune.recognise import MASKS, SMOOTH
from edgetune.record import Frozen

INPUT, BITS = ":input", ":bits"

Coding = Literal["float", "int8", "bits"]
"""How weights lie in the file."""
Expected = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Role -> type and shape of a tensor."""
Channels = tuple[int, bool]
"""How many a value has, and whether it is bits."""


def _checked(geometry: ConvGeometry) -> ConvGeometry:
    layer_of(geometry, 0).check()
    return geometry


Geometry = Annotated[ConvGeometry, AfterValidator(_checked)]
"""Of a convolution that there can be."""


class Layer(Frozen):
    """One step: reads the values `sources` (layer names with or without ":bits", or ":input")."""

    reads: ClassVar[tuple[int, ...]] = (1,)
    """How many sources there may be."""

    name: str = Field(pattern=r"^[^:]+$")
    sources: tuple[str, ...]

    def tensors(self) -> Expected:
        """What it needs of the file, by role."""
        return {}

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError where its tensors, right in type and shape, hold what cannot be."""

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        """What it makes of such values, by name. Raises ValueError where it cannot read them."""
        return {self.name: _map(given[0])}


class Conv(Layer):
    """A convolution of a map with float weights, made from their coding."""

    op: Literal["conv"] = "conv"
    geometry: Geometry
    coding: Coding
    bias: bool = False

    def tensors(self) -> Expected:
        return _weights(filter_shape(self.geometry), self.coding, self.bias)

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        _agree(_map(given[0])[0], self.geometry.in_channels)
        return {self.name: (self.geometry.out_channels, False)}


class Linear(Layer):
    """A linear layer."""

    op: Literal["linear"] = "linear"
    in_features: PositiveInt
    out_features: PositiveInt
    coding: Literal["float", "int8"]
    bias: bool = False

    def tensors(self) -> Expected:
        return _weights((self.out_features, self.in_features), self.coding, self.bias)

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        _agree(given[0], (self.in_features, False))
        return {self.name: (self.out_features, False)}


class Binary(Layer):
    """What convolutions of bits have in common; beyond the borders every value is `pad_value`."""

    geometry: Geometry
    pad_value: Literal[-1, 0, 1]

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        _agree(given[0], (self.geometry.in_channels, True))
        return {self.name: (self.geometry.out_channels, False)}


class BinaryMap(Binary):
    """A convolution of bits whose answer is a map: scale times the sums, times K of the map read second (with
    `input_scale`), plus a bias."""

    reads = (1, 2)

    op: Literal["binary_map"] = "binary_map"
    input_scale: bool = False
    bias: bool = False

    def tensors(self) -> Expected:
        return _weights(filter_shape(self.geometry), "bits", self.bias)

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        _agree(len(given), 1 + self.input_scale)
        for other in given[1:]:
            _agree(other, (self.geometry.in_channels, False))
        return super().makes(given)


class BinarySign(Binary):
    """A convolution of bits whose answer is bits: where the sums reach their thresholds."""

    op: Literal["binary_sign"] = "binary_sign"

    def tensors(self) -> Expected:
        shape = filter_shape(self.geometry)
        return {"weight": (torch.uint8, (_bytes(shape),)), "threshold": (torch.int32, shape[:1]),
                "flip": (torch.bool, shape[:1])}

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        super().makes(given)
        return {self.name + BITS: (self.geometry.out_channels, True)}


class Adder(Layer):
    """A convolution by additions alone, of a map whose values are at least 0: filters in whole steps of `bits` bits, in
    `groups` groups with a step each; with `exact`, values beyond the last step count in full."""

    op: Literal["adder"] = "adder"
    geometry: Geometry
    bits: int = Field(ge=2, le=8)
    groups: int = Field(ge=1, le=256)
    exact: bool = True
    bias: bool = False

    def tensors(self) -> Expected:
        shape = filter_shape(self.geometry)
        floats = ("shift", "bias") if self.bias else ("shift",)
        return {"weight": (torch.uint8, (_bytes(shape, self.bits),)), "group": (torch.uint8, shape[:1]),
                "step": (torch.float32, (self.groups,)), **dict.fromkeys(floats, (torch.float32, shape[:1]))}

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        found = tensors["group"].unique().tolist()
        if found != list(range(self.groups)):
            raise ValueError(f"filters are in groups {found}, and there are {self.groups}, from 0 on")

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        _agree(given[0], (self.geometry.in_channels, False))
        _agree(self.geometry.groups, 1)
        return {self.name: (self.geometry.out_channels, False)}


class Pointwise(Layer):
    """What is computed value by value, in this order: norm, sum with the second source, an activation that keeps
    values between bounds. The answer is a map, with `bits` the signs of that, or both."""

    reads = (1, 2)

    op: Literal["pointwise"] = "pointwise"
    channels: PositiveInt
    norm: bool = False
    activation: str | None = None
    map: bool = True
    bits: bool = False

    @field_validator("activation")
    @classmethod
    def _is_known(cls, function: str | None) -> str | None:
        if function is not None and function not in MASKS:
            raise ValueError(f"'{function}' does not keep values between bounds")
        return function

    def tensors(self) -> Expected:
        return dict.fromkeys(("gain", "shift"), (torch.float32, (self.channels,))) if self.norm else {}

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        for value in given:
            _agree(value, (self.channels, False))
        return ({self.name: given[0]} if self.map else {}) | (
            {self.name + BITS: (self.channels, True)} if self.bits else {})


class Smooth(Layer):
    """An activation that does more than keep values between bounds."""

    op: Literal["smooth"] = "smooth"
    function: str

    @field_validator("function")
    @classmethod
    def _is_known(cls, function: str) -> str:
        if function not in SMOOTH:
            raise ValueError(f"there is no activation '{function}'")
        return function


class Window(Frozen):
    """The window of a pool, in pixels: rows, then columns."""

    kernel: tuple[PositiveInt, PositiveInt]
    stride: tuple[PositiveInt, PositiveInt]
    pad: tuple[int, int] = (0, 0)
    dilation: tuple[PositiveInt, PositiveInt] = (1, 1)
    ceil_mode: bool = False

    @model_validator(mode="after")
    def _pads_little(self) -> Window:
        if any(not 0 <= pad <= kernel // 2 for pad, kernel in zip(self.pad, self.kernel, strict=True)):
            raise ValueError(f"a window of {self.kernel} cannot be padded by {self.pad}")
        return self


class MaxPool(Layer):
    """The largest value under each window of a map."""

    op: Literal["max_pool"] = "max_pool"
    window: Window


class BitPool(Layer):
    """Whether any bit is set under each window of a map of bits; with `flipped`, the other way round where `flip`."""

    op: Literal["bit_pool"] = "bit_pool"
    window: Window
    channels: PositiveInt
    flipped: bool = False

    def tensors(self) -> Expected:
        return {"flip": (torch.bool, (self.channels,))} if self.flipped else {}

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        _agree(given[0], (self.channels, True))
        return {self.name + BITS: given[0]}


class Mean(Layer):
    """The mean of each channel over the whole map: (c 1 1) with `keepdim`, else (c)."""

    op: Literal["mean"] = "mean"
    keepdim: bool


class Flatten(Layer):
    """(c h w) as one axis of so many `features`."""

    op: Literal["flatten"] = "flatten"
    features: PositiveInt

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        _agree(self.features % _map(given[0])[0], 0)
        return {self.name: (self.features, False)}


class Subsample(Layer):
    """Every n-th row and column."""

    op: Literal["subsample"] = "subsample"
    stride: tuple[PositiveInt, PositiveInt]


class Pad(Layer):
    """Zero channels before and after."""

    op: Literal["pad"] = "pad"
    before: int = Field(ge=0)
    after: int = Field(ge=0)

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        return {self.name: (_map(given[0])[0] + self.before + self.after, False)}


class Scale(Layer):
    """The product of a map and one number a channel."""

    reads = (2,)

    op: Literal["scale"] = "scale"

    def makes(self, given: tuple[Channels, ...]) -> dict[str, Channels]:
        _agree(_map(given[0]), _map(given[1]))
        return {self.name: given[0]}


def filter_shape(geometry: ConvGeometry) -> tuple[int, int, int, int]:
    """(o i u v) of a convolution's weight."""
    return geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel


def _weights(shape: tuple[int, ...], coding: Coding, bias: bool) -> Expected:
    kinds: Mapping[Coding, Expected] = {
        "float": {"weight": (torch.float32, shape)},
        "int8": {"weight": (torch.int8, shape), "scale": (torch.float32, shape[:1])},
        "bits": {"weight": (torch.uint8, (_bytes(shape),)), "scale": (torch.float32, shape[:1])}}
    return kinds[coding] | ({"bias": (torch.float32, shape[:1])} if bias else {})


def _bytes(shape: tuple[int, ...], bits: int = 1) -> int:
    """Of so many numbers of `bits` bits, one after the other."""
    return -(-torch.Size(shape).numel() * bits // 8)


def _map(value: Channels) -> Channels:
    if value[1]:
        raise ValueError("bits stand where a map is expected")
    return value


def _agree(found: object, meant: object) -> None:
    if found != meant:
        raise ValueError(f"{found} stands where {meant} is meant")
