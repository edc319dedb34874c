"""The packed network as a torch module: bits from layer to layer, maps channels last where there are any."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from edgetune.errors import ModelError
from edgetune.packed.layers import INPUT, BinaryMap, Layer, Pointwise
from edgetune.packed.modules import MODULES, BinaryClip
from edgetune.packed.record import Packed

Run = tuple[Layer] | tuple[BinaryMap, Pointwise]
"""Layers that run as one."""


class PackedNetwork(nn.Module):
    """x (n c h w) float32, preprocessed -> the network's answer; for any batch, and any map that the network takes.

    Filters are arranged for the kernels here, once. It learns nothing and has no gradients.
    """

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.graph, self.runs = packed.graph, joined(packed.graph.layers)
        self.steps = nn.ModuleList(_step(run, packed) for run in self.runs)
        self.sources = tuple((*run[0].sources, *(run[1].sources[1:] if len(run) > 1 else ())) for run in self.runs)
        self.over = last_read(self.sources)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.shape[1] != self.graph.input_shape[1]:
            raise ModelError(f"the network takes pictures (n {self.graph.input_shape[1]} h w) and was given "
                             f"{tuple(x.shape)}: preprocess them as in training")
        values = {INPUT: x.to(torch.float32, memory_format=torch.channels_last)}
        for sources, step, over in zip(self.sources, self.steps, self.over, strict=True):
            values |= step(*[values[name] for name in sources])
            for name in over:
                del values[name]
        return values[self.graph.layers[-1].name]


def joined(line: Sequence[Layer]) -> tuple[Run, ...]:
    """What runs as one, in order: a convolution of bits with the pointwise step that alone reads its map, and first."""
    readers = Counter(name for layer in line for name in layer.sources)
    convs = {layer.name: layer for layer in line if isinstance(layer, BinaryMap)
             and readers[layer.name] == 1 and not layer.input_scale and not layer.bias}
    pairs = {layer.name: (convs[layer.sources[0]], layer) for layer in line
             if isinstance(layer, Pointwise) and layer.sources[0] in convs}
    inside = {conv.name for conv, _ in pairs.values()}
    return tuple(pairs.get(layer.name, (layer,)) for layer in line if layer.name not in inside)


def last_read(sources: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """For each step, the values that no later one reads: they can be let go of once it has run."""
    last = {name: index for index, names in enumerate(sources) for name in names}
    return tuple(tuple(name for name, at in last.items() if at == index) for index in range(len(sources)))


def _step(run: Run, packed: Packed) -> nn.Module:
    if len(run) == 2:
        conv, behind = run
        return BinaryClip(conv, packed.of(conv.name), behind, packed.of(behind.name))
    (layer,) = run
    module: nn.Module = MODULES[type(layer)](layer, packed.of(layer.name))
    return module
