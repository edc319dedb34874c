"""`edgetune bench adder`: convolutions by additions alone, layer by layer.

"float adder" sums absolute differences of float numbers; "bytes" those of bytes, with the instruction that processors
have for it, and gives integers, "bytes to floats" the scaled answer. Each is compared with torch's float convolution of
the same shape, and the bytes with the float adder as well (`adder_speedup`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from edgetune import kernels
from edgetune.bench import timing
from edgetune.bench.convolutions import RESNET18, RESNET20, Candidate, ConvolutionOptions, Drawn, Shape, measure
from edgetune.hosts.adder import differences

SPEEDUPS = ("speedup", "adder_speedup", "int8_speedup", "gmac_s")
FLOAT = "float adder"
LEVELS = 127
"""Weights of 7 bits and activations beside them: all differences fit in bytes."""


class Options(ConvolutionOptions):
    """Which layers, how set, how long."""

    shapes: tuple[Shape, ...] = (*RESNET18, *RESNET20)


def candidates(drawn: Drawn) -> Sequence[Candidate]:
    """The layer by additions, of floats and of bytes."""
    geometry, x = drawn.shape.geometry, drawn.x.contiguous(memory_format=torch.channels_last)
    weight = drawn.weight / drawn.weight.std()
    top, bottom, left, right = geometry.pads
    common = (geometry.stride, (top, left, bottom, right), geometry.dilation, geometry.groups)
    bytes_, small = ((t * 30 + LEVELS).clamp(0, 2 * LEVELS).to(torch.uint8) for t in (x, weight))
    filters, o = kernels.adder_filters(small, geometry.groups), geometry.out_channels
    scale, shift = torch.full((o,), -0.05), torch.randn(o)

    def slow(read: torch.Tensor, by: torch.Tensor, border: float) -> torch.Tensor:
        """Of the first sample and four filters of a layer without groups, written out."""
        one = F.pad(read[:1].double(), (left, right, top, bottom), value=border)
        columns = F.unfold(one, geometry.kernel, stride=geometry.stride)[0]
        return torch.stack([(columns - each.reshape(-1, 1).double()).abs().sum(0) for each in by[:4]])

    def some(y: torch.Tensor) -> torch.Tensor:
        return y[0, :4].flatten(1).double()

    def floats() -> torch.Tensor:
        return differences(x, weight, geometry)

    def integers() -> torch.Tensor:
        return kernels.adder_conv_u8(bytes_, filters, o, geometry.kernel, *common, LEVELS)

    def scaled() -> torch.Tensor:
        return kernels.adder_conv_u8_scaled(bytes_, filters, scale, shift, None, geometry.kernel, *common, LEVELS)

    def scaled_close() -> bool:
        expected = slow(bytes_, small, LEVELS) * -0.05 + shift[:4, None].double()
        return torch.allclose(some(scaled()), expected, rtol=1e-5, atol=1e-3)

    return (Candidate(FLOAT, floats, lambda: torch.allclose(-some(floats()), slow(x, weight, 0.0), rtol=1e-4)),
            Candidate("bytes", integers, lambda: torch.equal(some(integers()), slow(bytes_, small, LEVELS))),
            Candidate("bytes to floats", scaled, scaled_close))


def run(options: Options | None = None, progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every layer; `progress` sees each row as soon as it is there."""
    rows = measure(candidates, options or Options(), progress)
    alone = {_layer(row): row["method_ms"] for row in rows if row["method"] == FLOAT}
    for row in rows:
        if row["method"] != FLOAT:
            row["adder_speedup"] = alone[_layer(row)] / row["method_ms"]
    return timing.result(rows)


def _layer(row: timing.Row) -> tuple[object, ...]:
    return row["case"], row["batch"], row["threads"]


def summarise(path: str) -> list[timing.Row]:
    """The medians over the layers, one row a machine, method, batch and number of threads."""
    return timing.medians(timing.read(path), SPEEDUPS, ("machine", "method", "batch", "threads"))
