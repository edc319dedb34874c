"""One convolution's forward pass at a time, by other arithmetic, against the best that torch has for it in float.

The baseline is the fastest of oneDNN's float convolutions: contiguous, channels last, and channels last with weights
laid out beforehand, as a compiled and frozen network has them. Beside it stands the fastest of torch's int8
convolutions, where there is one. Answers are checked in the same run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field

from edgetune.bench import timing
from edgetune.kernels import heap
from edgetune.overlap import ConvGeometry
from edgetune.record import Record

Functions = dict[str, Callable[[], Any]]


class Shape(Record):
    """A square layer: `size` pixels on a side of its input, padded by half its kernel."""

    network: str
    in_channels: int
    out_channels: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def case(self) -> str:
        """The layer in a few words."""
        channels = str(self.in_channels) + ("" if self.in_channels == self.out_channels else f"-{self.out_channels}")
        grouped = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.network} {channels}@{self.size} k{self.kernel} s{self.stride}{grouped}"

    @property
    def geometry(self) -> ConvGeometry:
        """All about it."""
        pad = self.kernel // 2
        return ConvGeometry(in_channels=self.in_channels, out_channels=self.out_channels, groups=self.groups,
                            in_hw=(self.size, self.size), kernel=(self.kernel, self.kernel),
                            stride=(self.stride, self.stride), dilation=(1, 1), pads=(pad, pad, pad, pad))


def _shapes(network: str, *rows: tuple[int, ...]) -> tuple[Shape, ...]:
    names = ("in_channels", "out_channels", "size", "kernel", "stride", "groups")
    return tuple(Shape(network=network, **dict(zip(names, row, strict=False))) for row in rows)


RESNET18 = _shapes("resnet18", (64, 64, 56), (64, 128, 56, 3, 2), (128, 128, 28), (128, 256, 28, 3, 2), (256, 256, 14),
                   (256, 512, 14, 3, 2), (512, 512, 7))
VGG_SMALL = _shapes("vgg_small", (128, 128, 32), (128, 256, 16), (256, 256, 16), (256, 512, 8), (512, 512, 8))
MOBILENET = _shapes("mobilenet", (64, 128, 56, 1), (256, 256, 28, 1), (512, 512, 14, 1), (1024, 1024, 7, 1),
                    (256, 256, 28, 3, 1, 256))
RESNET20 = _shapes("resnet20", (16, 16, 32), (32, 32, 16), (64, 64, 8))


class ConvolutionOptions(Record):
    """Which layers, how set, how long; `quick` is one round of the smaller ones."""

    shapes: tuple[Shape, ...] = (*RESNET18, *VGG_SMALL, *MOBILENET)
    batches: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] = (1, 2)
    clock: timing.Clock = "wall"
    rounds: int = Field(11, ge=1)
    turn_ms: float = Field(4.0, ge=0)
    seed: int = 0
    quick: bool = False


@dataclass(frozen=True)
class Drawn:
    """A layer with its numbers: x (n c h w) and weight (o i u v), float32."""

    shape: Shape
    x: torch.Tensor
    weight: torch.Tensor

    @classmethod
    def of(cls, shape: Shape, batch: int, seed: int) -> Drawn:
        """Numbers as they are inside a network."""
        source = torch.Generator().manual_seed(seed)
        x = torch.randn((batch, shape.in_channels, shape.size, shape.size), generator=source)
        i = shape.in_channels // shape.groups
        weight = torch.randn((shape.out_channels, i, shape.kernel, shape.kernel), generator=source)
        return cls(shape, x, weight * (2 / weight[0].numel()) ** 0.5)


@dataclass(frozen=True)
class Candidate:
    """A way to compute the layer: `run` is what is timed, `exact` tells whether its answer is as it must be."""

    method: str
    run: Callable[[], Any]
    exact: Callable[[], bool]


Candidates = Callable[[Drawn], Sequence[Candidate]]
"""What a suite compares with the float convolution of the same layer."""


def measure(candidates: Candidates, options: ConvolutionOptions,
            progress: Callable[[timing.Row], None] | None = None) -> list[timing.Row]:
    """Every layer by every candidate, batch and number of threads; `progress` sees each row when it is there."""
    if options.quick:
        small = tuple(shape for shape in options.shapes if shape.geometry.macs < 4e7)
        options = options.model_copy(update={"rounds": 1, "turn_ms": 0.0, "shapes": small, "batches": (1,)})
    heap.keep_freed_memory()
    rows: list[timing.Row] = []
    for count in options.threads:
        with timing.threads(count), torch.no_grad():
            for batch in options.batches:
                for shape in options.shapes:
                    for row in _layer(Drawn.of(shape, batch, options.seed), candidates, count, options):
                        rows.append(row)
                        if progress is not None:
                            progress(row)
    return rows


def _layer(drawn: Drawn, candidates: Candidates, threads: int, options: ConvolutionOptions) -> list[timing.Row]:
    floats, integers, found = _floats(drawn), _integers(drawn), candidates(drawn)
    functions = {**floats, **integers, **{each.method: each.run for each in found}}
    timed = timing.interleave(functions, rounds=options.rounds, turn_ms=options.turn_ms, clock=options.clock)
    baseline = min(floats, key=timed.ms.__getitem__)
    int8 = min((timed.ms[name] for name in integers), default=None)
    macs = len(drawn.x) * drawn.shape.geometry.macs
    return [{
        "case": drawn.shape.case, "method": each.method, "batch": len(drawn.x), "threads": threads,
        "kernel_size": drawn.shape.kernel, "baseline": baseline, "baseline_ms": timed.ms[baseline],
        "method_ms": timed.ms[each.method], "speedup": timed.ms[baseline] / timed.ms[each.method],
        "gmac_s": macs / timed.ms[each.method] / 1e6, "int8_ms": int8,
        "int8_speedup": None if int8 is None else int8 / timed.ms[each.method],
        "exact": each.exact(), "others": timed.others, "clock": options.clock, "quick": options.quick,
    } for each in found]  # fmt: skip


def _floats(drawn: Drawn) -> Functions:
    x, weight, g = drawn.x, drawn.weight, drawn.shape.geometry
    pad = (g.pads[0], g.pads[2])
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, weight)]
    made: Functions = {
        "contiguous": lambda: F.conv2d(x, weight, None, g.stride, pad, g.dilation, g.groups),
        "channels last": lambda: F.conv2d(last[0], last[1], None, g.stride, pad, g.dilation, g.groups),
    }
    if torch.backends.mkldnn.is_available():
        lay_out: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        ready = lay_out(weight.to_mkldnn(), pad, g.stride, g.dilation, g.groups, x.shape)
        made["laid out"] = lambda: torch.ops.mkldnn._convolution_pointwise(
            last[0], ready, None, pad, g.stride, g.dilation, g.groups, "none", [], "")
    return made


def _integers(drawn: Drawn) -> Functions:
    """torch's int8 convolutions, one an engine."""
    g, made = drawn.shape.geometry, Functions()
    with _silent():
        x = torch.quantize_per_tensor(drawn.x.relu(), 0.03, 0, torch.quint8)
        weight = torch.quantize_per_channel(drawn.weight, drawn.weight.abs().amax((1, 2, 3)).double() / 127,
                                            torch.zeros(len(drawn.weight), dtype=torch.long), 0, torch.qint8)
        x = x.contiguous(memory_format=torch.channels_last)
        for engine in ("onednn", "x86", "fbgemm"):
            if engine in torch.backends.quantized.supported_engines:
                torch.backends.quantized.engine = engine
                pad = (g.pads[0], g.pads[2])
                packed = torch.ops.quantized.conv2d_prepack(weight, None, g.stride, pad, g.dilation, g.groups)
                made[f"int8 {engine}"] = _int8(x, packed, engine)
    return made


def _int8(x: torch.Tensor, packed: Any, engine: str) -> Callable[[], Any]:
    def run() -> Any:
        torch.backends.quantized.engine = engine
        return torch.ops.quantized.conv2d(x, packed, 0.1, 64)
    return run


@contextmanager
def _silent() -> Iterator[None]:
    """torch tells at every use that these operators are to leave it."""
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.backends.quantized.engine = before
