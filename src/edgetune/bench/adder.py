"""`edgetune bench adder`: convolutions by additions alone, layer by layer and as whole networks.

"float adder" sums absolute differences of float numbers; "bytes" those of bytes, with the instruction that processors
have for it, and gives integers; "floats to floats" is a layer of `quantized_adder` as a packed network computes it: it
reads floats, counts them in the steps of its groups of filters, and answers in floats. Each is compared with torch's
float convolution of the same shape, and the last two with the float adder as well (`adder_speedup`). A whole network is
packed (`bench.whole`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from edgetune import kernels
from edgetune.bench import timing, whole
from edgetune.bench.convolutions import RESNET18, RESNET20, Candidate, Drawn, Shape, measure
from edgetune.hosts.adder import differences
from edgetune.hosts.adder_integers import answer, arranged
from edgetune.methods.arithmetic.quantized_adder import QuantizedAdder, reach_of

SPEEDUPS = ("speedup", "adder_speedup", "int8_speedup", "gmac_s")
FLOAT = "float adder"
LEVELS = 127
"""In the middle of a byte."""


METHODS = (QuantizedAdder(bits=8), QuantizedAdder(bits=4))
"""Of the whole networks. More bits take no more time."""


class Options(whole.WholeOptions):
    """Which layers and which whole networks, how set, how long."""

    shapes: tuple[Shape, ...] = (*RESNET18, *RESNET20)
    networks: tuple[whole.Network, ...] = (whole.Network(name="resnet20", size=32),
                                           whole.Network(name="resnet18", size=224))


def candidates(drawn: Drawn) -> Sequence[Candidate]:
    """The layer by additions, of floats and of bytes."""
    geometry, x = drawn.shape.geometry, drawn.x.contiguous(memory_format=torch.channels_last)
    weight = drawn.weight / drawn.weight.std()
    top, bottom, left, right = geometry.pads
    common = (geometry.stride, (top, left, bottom, right), geometry.dilation, geometry.groups)
    bytes_, small = ((t * 30 + LEVELS).clamp(0, 2 * LEVELS).to(torch.uint8) for t in (x, weight))
    filters, o = kernels.adder_filters(small, geometry.groups), geometry.out_channels
    method, read = QuantizedAdder(), x.relu()
    steps = method.steps(weight, reach_of(read))
    layer = arranged(steps)

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

    def counted() -> torch.Tensor:
        return answer(read, layer, geometry, method.bits, method.exact)

    def counted_close() -> bool:
        step, levels = steps.step[steps.group[:4]].view(4, 1, 1, 1), 2**method.bits - 1
        steps_read = torch.cat([read[:1] * each.reciprocal() for each in step])
        sums = torch.cat([slow(each.round().clamp(0, levels)[None], own[None], 0.0)
                          for each, own in zip(steps_read, steps.weight[:4], strict=True)])
        over = torch.cat([slow((each - levels).clamp(min=0)[None], torch.zeros_like(weight[:1]), 0.0)
                          for each in steps_read])
        expected = steps.shift[:4, None].double() - step.view(4, 1).double() * (sums + over)
        return torch.allclose(some(counted()), expected, rtol=1e-5, atol=1e-3)

    return (Candidate(FLOAT, floats, lambda: torch.allclose(-some(floats()), slow(x, weight, 0.0), rtol=1e-4)),
            Candidate("bytes", integers, lambda: torch.equal(some(integers()), slow(bytes_, small, LEVELS))),
            Candidate("floats to floats", counted, counted_close))


def run(options: Options | None = None, progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every network and every layer; `progress` sees each row as soon as it is there."""
    options = options or Options()
    networks, rows = whole.rows(METHODS, options, progress), measure(candidates, options, progress)
    alone = {_layer(row): row["method_ms"] for row in rows if row["method"] == FLOAT}
    for row in rows:
        if row["method"] != FLOAT:
            row["adder_speedup"] = alone[_layer(row)] / row["method_ms"]
    return timing.result([*networks, *rows])


def _layer(row: timing.Row) -> tuple[object, ...]:
    return row["case"], row["batch"], row["threads"]


def summarise(path: str) -> list[timing.Row]:
    """The medians over the layers, one row a machine, method, batch and number of threads."""
    return timing.medians(timing.read(path), SPEEDUPS, ("machine", "method", "batch", "threads"))
