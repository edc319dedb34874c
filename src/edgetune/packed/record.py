"""The packed network as a record: what runs on kernels of bits and bytes, with as many bits a weight as its method has.

    header    PackedGraph: layers in the order of execution, what each reads and makes, geometry
    tensors   `<layer>.weight` as its coding says: bits uint8, dense, lowest first, (o u v i) in memory order; int8
              (o i u v) or float32; `<layer>.scale` float32 (o), what bits or int8 are multiplied by; `<layer>.bias`
              float32 (o). Where a layer's answer is bits, `<layer>.threshold` int32 (o) and `<layer>.flip` bool (o) in
              place of its scale: see `kernels.binary_conv_sign`. Of a norm `<layer>.gain` and `<layer>.shift`, (c).
              Of an adder layer `<layer>.weight` whole steps, uint8, so many dense bits each, lowest first, (o i u v);
              `<layer>.group` uint8 (o), in whose steps a filter counts, `<layer>.step` float32 (groups) and
              `<layer>.shift` float32 (o): see `hosts.adder_integers`

A layer makes a map under its own name, the bits of a map under that name and ":bits", or both. One safetensors file
holds all, with the header as JSON among its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, PositiveInt, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch

from edgetune.errors import EdgetuneError, ModelError, WeightsError
from edgetune.packed.layers import (
    INPUT,
    Adder,
    BinaryMap,
    BinarySign,
    BitPool,
    Channels,
    Conv,
    Flatten,
    Linear,
    MaxPool,
    Mean,
    Pad,
    Pointwise,
    Scale,
    Smooth,
    Subsample,
)
from edgetune.record import Record, atomic_write

HEADER = "edgetune.packed"
FORMAT = 1
"""The version that is written, and the one that is read."""


AnyLayer = Annotated[Conv | Linear | BinaryMap | BinarySign | Adder | Pointwise | Smooth | MaxPool | BitPool | Mean
                     | Flatten | Subsample | Pad | Scale, Field(discriminator="op")]


class PackedGraph(Record):
    """The header. `input_shape` is (n c h w) of the sample; the last layer's map is the network's answer."""

    input_shape: tuple[int, PositiveInt, int, int]
    layers: tuple[AnyLayer, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _reads_what_is_there(self) -> PackedGraph:
        known: dict[str, Channels] = {INPUT: (self.input_shape[1], False)}
        names = {INPUT}
        for layer in self.layers:
            if missing := set(layer.sources) - known.keys():
                raise ValueError(f"layer '{layer.name}' reads '{min(missing)}', which no layer before it makes")
            if layer.name in names:
                raise ValueError(f"two layers are called '{layer.name}'")
            if len(layer.sources) not in layer.reads:
                raise ValueError(f"layer '{layer.name}' reads {len(layer.sources)} values")
            try:
                known |= layer.makes(tuple(known[source] for source in layer.sources))
            except ValueError as failure:
                raise ValueError(f"layer '{layer.name}' cannot be run: {failure}") from failure
            names.add(layer.name)
        if self.layers[-1].name not in known:
            raise ValueError("the last layer makes no map")
        return self


@dataclass(frozen=True)
class Packed:
    """A packed network: header and tensors, which are checked against each other."""

    graph: PackedGraph
    tensors: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        wanted = {f"{layer.name}.{role}": what for layer in self.graph.layers
                  for role, what in layer.tensors().items()}
        if wanted.keys() != self.tensors.keys():
            odd = min(wanted.keys() ^ self.tensors.keys())
            raise ModelError(f"the tensor '{odd}' is {'missing' if odd in wanted else 'one too many'}: "
                             "tensors and layers must belong to the same packed network")
        for key, (dtype, shape) in wanted.items():
            tensor = self.tensors[key]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ModelError(f"the tensor '{key}' is {tensor.dtype} {tuple(tensor.shape)} where {dtype} {shape} "
                                 "is meant: pack the network anew")
        for layer in self.graph.layers:
            try:
                layer.check(self.of(layer.name))
            except ValueError as failure:
                raise ModelError(f"layer '{layer.name}' cannot be run, as its {failure}: pack the network anew"
                                 ) from failure

    def of(self, layer: str) -> dict[str, torch.Tensor]:
        """The tensors of one layer by role."""
        return {role: tensor for key, tensor in self.tensors.items()
                for owner, _, role in [key.rpartition(".")] if owner == layer}

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in self.tensors.items()}
        layers = [{"op": layer.op, **layer.model_dump(mode="json", exclude_defaults=True)}
                  for layer in self.graph.layers]
        header = json.dumps({"format": FORMAT, "graph": {"input_shape": self.graph.input_shape, "layers": layers}},
                            separators=(",", ":"))
        atomic_write(path, safetensors_torch.save(whole, {HEADER: header}))

    @classmethod
    def load(cls, path: str | Path) -> Packed:
        """Read back what `save` wrote. Raises WeightsError naming the file and what is wrong with it."""
        try:
            with safe_open(path, "pt") as file:  # type: ignore[no-untyped-call]
                header = (file.metadata() or {}).get(HEADER)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return cls(_graph(header), tensors)
        except (SafetensorError, OSError, ValueError, RecursionError, EdgetuneError) as failure:
            raise WeightsError(f"'{path}' cannot be read as a packed network ({_told(failure)}): give a file that "
                               "edgetune packed, in the format of this version") from failure


def _graph(header: str | None) -> PackedGraph:
    """What a file says of its layers. Raises ValueError."""
    if header is None:
        raise ValueError("it holds no packed network")
    told = json.loads(header)
    if not isinstance(told, dict) or told.keys() != {"format", "graph"}:
        raise ValueError("its header is not of a packed network")
    if told["format"] != FORMAT:
        raise ValueError(f"it has format {told['format']!r}, and {FORMAT} is read")
    return PackedGraph.model_validate_json(json.dumps(told["graph"]))


def _told(failure: Exception) -> str:
    if isinstance(failure, ValidationError):
        first = failure.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc']) or 'its header'}: {first['msg']}"
    return (str(failure).splitlines() or [type(failure).__name__])[0]
