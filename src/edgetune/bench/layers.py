"""One convolution at a time: what keeping and going backward cost, against oneDNN's (or cuDNN's) exact backward.

Four times a layer, as the published study has them and beyond it: the forward pass; keeping the pooled input;
backward with un-pooling, from a full output gradient to a full input gradient and a k x k weight gradient; and
backward on the grid, from patch means to patch means, the sum over the kernel's taps included. There the weight
gradient of the mean form is the tap mean (o i), which is all its taps hold; the grid form's is k x k.
In the same run: cosine and scale against the exact gradient, and the error against a slow float64 computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from edgetune import kernels
from edgetune.bench import timing
from edgetune.kernels import heap
from edgetune.methods.backward.gradient_filter import GradientFilter, Taps, grid_backward, input_cell
from edgetune.overlap import ConvGeometry
from edgetune.record import Record

PUBLISHED = ((128, 120, 160), (256, 60, 80), (512, 30, 40), (512, 14, 14), (256, 14, 14), (128, 28, 28),
             (64, 56, 56))
"""(channels, rows, columns) of the layers in the published study; k3 s1 p1."""
SPEEDUPS = ("backward_speedup", "grid_speedup", "keep_overhead", "cosine", "scale")


class LayersOptions(Record):
    """Which layers, how set, how long. `turn_ms` is how long one function runs before the next has its turn;
    `quick` is one round of the small layers."""

    shapes: tuple[tuple[int, int, int], ...] = PUBLISHED
    patch_px: tuple[int, ...] = (2, 4)
    taps: tuple[Literal["mean", "grid"], ...] = ("mean", "grid")
    batch: int = Field(4, ge=1)
    threads: int = Field(2, ge=1)
    clock: timing.Clock = "wall"
    rounds: int = Field(11, ge=1)
    turn_ms: float = Field(5.0, ge=0)
    device: str = "cpu"
    seed: int = 0
    quick: bool = False


def run(options: LayersOptions | None = None, progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every shape with every setting; `progress` sees each row as soon as it is there."""
    options = options or LayersOptions()
    if options.quick:
        small = tuple(shape for shape in options.shapes if shape[0] * shape[1] * shape[2] < 128 * 1024)
        options = options.model_copy(update={"rounds": 1, "turn_ms": 0.0, "shapes": small})
    allocator = heap.keep_freed_memory()
    rows: list[timing.Row] = []
    with timing.threads(options.threads), torch.no_grad():
        for shape in options.shapes:
            for row in _shape(_Layer.drawn(shape, options), options):
                row["allocator"] = allocator
                rows.append(row)
                if progress is not None:
                    progress(row)
    return timing.result(rows, options.device)


def summarise(path: str) -> list[timing.Row]:
    """The medians over the shapes, one row a machine, tap form and patch size."""
    return timing.medians(timing.read(path), SPEEDUPS, ("machine", "taps", "patch_px"))


@dataclass(frozen=True)
class _Layer:
    """A layer with its numbers: x (n c h w), weight (c c 3 3), gy (n c h w)."""

    geometry: ConvGeometry
    x: torch.Tensor
    weight: torch.Tensor
    gy: torch.Tensor

    @classmethod
    def drawn(cls, shape: tuple[int, int, int], options: LayersOptions) -> _Layer:
        c, h, w = shape
        geometry = ConvGeometry(in_channels=c, out_channels=c, groups=1, in_hw=(h, w), kernel=(3, 3), stride=(1, 1),
                                dilation=(1, 1), pads=(1, 1, 1, 1))
        source = torch.Generator().manual_seed(options.seed)
        x = _smooth((options.batch, c, h, w), source).relu()
        weight = torch.randn((c, c, 3, 3), generator=source) * (2 / (9 * c)) ** 0.5
        gy = _smooth((options.batch, c, h, w), source)
        return cls(geometry, *(t.to(options.device) for t in (x, weight, gy)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, None, 1, 1)

    def backward(self, gy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gx, gw, _ = torch.ops.aten.convolution_backward(gy, x, weight, None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1,
                                                        (True, True, False))
        return gx, gw


def _smooth(shape: tuple[int, ...], source: torch.Generator) -> torch.Tensor:
    """Noise whose energy falls with frequency, as maps inside a network have it; standard deviation 1."""
    n, c, h, w = shape
    x = torch.zeros(shape)
    for zoom in (1, 2, 4, 8):
        coarse = torch.randn((n, c, max(h // zoom, 1), max(w // zoom, 1)), generator=source)
        x += F.interpolate(coarse, size=(h, w), mode="bilinear", align_corners=False) if zoom > 1 else coarse
    return x / x.std()


def _shape(layer: _Layer, options: LayersOptions) -> list[timing.Row]:
    exact = layer.backward(layer.gy, layer.x, layer.weight)
    settings = [GradientFilter(patch_px=r, taps=taps) for taps in options.taps for r in options.patch_px]
    functions = _baselines(layer)
    for own in settings:
        functions |= {f"{part} {own.taps} {own.patch_px}": call for part, call in _method(layer, own).items()}
    timed = timing.interleave(functions, rounds=options.rounds, turn_ms=options.turn_ms, device=options.device,
                              clock=options.clock)
    return [_row(layer, own, exact, timed, options) for own in settings]


def _baselines(layer: _Layer) -> dict[str, Callable[[], object]]:
    last = [t.contiguous(memory_format=torch.channels_last) for t in (layer.gy, layer.x, layer.weight)]
    return {"forward": lambda: layer.forward(layer.x),
            "forward last": lambda: F.conv2d(last[1], last[2], None, 1, 1),
            "exact": lambda: layer.backward(layer.gy, layer.x, layer.weight),
            "exact last": lambda: layer.backward(*last)}


def _method(layer: _Layer, own: GradientFilter) -> dict[str, Callable[[], object]]:
    geometry, weight = layer.geometry, layer.weight
    kept, on_grid = own.save(layer.x, geometry), own.receive(layer.gy, geometry)

    def unpooled() -> object:
        return own.gradients(kept, own.receive(layer.gy, geometry), weight, geometry, wants_input=True)

    return {"keep": lambda: own.save(layer.x, geometry), "method": unpooled,
            "grid": lambda: grid_backward(kept, on_grid, weight, geometry, own.patch_px, own.taps, spread=False)}


def _row(layer: _Layer, own: GradientFilter, exact: tuple[torch.Tensor, torch.Tensor], timed: timing.Timed,
         options: LayersOptions) -> timing.Row:
    ms = timed.ms
    keep, method, grid = (ms[f"{part} {own.taps} {own.patch_px}"] for part in ("keep", "method", "grid"))
    forward, baseline = min(ms["forward"], ms["forward last"]), min(ms["exact"], ms["exact last"])
    kept = own.save(layer.x, layer.geometry)
    layout = "contiguous" if ms["exact"] <= ms["exact last"] else "channels_last"
    n, c, h, w = layer.x.shape
    return {"case": f"{c}@{h}x{w}", "method": own.method, "patch_px": own.patch_px, "taps": own.taps, "batch": n,
            "threads": options.threads, "device": options.device, "seed": options.seed, "kernel_size": 3,
            "baseline_ms": baseline, "baseline_layout": layout, "quick": options.quick,
            "forward_ms": forward, "keep_ms": keep, "method_ms": method, "grid_ms": grid,
            "speedup": (forward + baseline) / (forward + keep + method), "backward_speedup": baseline / method,
            "grid_speedup": baseline / grid, "keep_overhead": keep / forward,
            "kept_bytes": kept.nbytes, "kept_bytes_baseline": layer.x.nbytes, "load": timing.load_average(),
            "others": timed.others, "clock": options.clock,
            **_faithfulness(layer, own, exact), "error": _error(layer, own)}


def _faithfulness(layer: _Layer, own: GradientFilter, exact: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Cosine with the exact gradients, and the scale |f|² / <f, e>: 1 where f is the projection of e it should be."""
    g = own.receive(layer.gy, layer.geometry)
    found = (own.grad_input(g, layer.weight, layer.geometry),
             own.grad_weight(own.save(layer.x, layer.geometry), g, layer.geometry))
    out: dict[str, float] = {}
    for suffix, f, e in zip(("_input", ""), found, exact, strict=True):
        f, e = f.double().flatten(), e.double().flatten()
        product = float(f @ e)
        out[f"cosine{suffix}"] = product / float(f.norm() * e.norm())
        out[f"scale{suffix}"] = float(f @ f) / product
    return out


def _error(layer: _Layer, own: GradientFilter) -> float:
    """Largest difference to the slow computation in float64 over its largest value; one sample, both gradients."""
    one = _Layer(layer.geometry, layer.x[:1], layer.weight, layer.gy[:1])
    kept, g = own.save(one.x, one.geometry), own.receive(one.gy, one.geometry)
    gx, gw = own.grad_input(g, one.weight, one.geometry), own.grad_weight(kept, g, one.geometry)
    errors = [float((f.double() - e).abs().max() / e.abs().max())
              for f, e in zip((gx, gw), slow_backward(one.x, one.weight, one.gy, one.geometry, own.patch_px, own.taps),
                              strict=True)]
    return max(errors)


def slow_backward(x: torch.Tensor, weight: torch.Tensor, gy: torch.Tensor, geometry: ConvGeometry, patch_px: int,
                  taps: Taps) -> tuple[torch.Tensor, torch.Tensor]:
    """The filtered gradients by definition, in float64, for stride 1: autograd's on maps that are constant on patches.

    For the mean form the share of taps inside the map is counted pixel by pixel. Returns gx (n c h w), gw (o i u v).
    """
    hw, cell = geometry.in_hw, input_cell(geometry, patch_px, taps)
    x, weight, gy = x.double(), weight.double(), gy.double()

    def flat(t: torch.Tensor) -> torch.Tensor:
        return kernels.patch_spread(kernels.patch_mean(t, *cell), t.shape[2], t.shape[3], *cell)

    if taps == "mean":
        inside, top = torch.ones((1, 1, *hw), dtype=x.dtype, device=x.device), (geometry.pads[0], geometry.pads[2])
        window = torch.ones((1, 1, *geometry.kernel), dtype=x.dtype, device=x.device) / weight[0, 0].numel()
        n = flat(F.conv2d(inside, window, padding=top))
        m = flat(F.conv_transpose2d(inside, window, padding=top))
        gx = torch.einsum("nohw,oi->nihw", flat(gy) * m, weight.sum((2, 3)))
        gw = torch.einsum("nohw,nihw->oi", flat(gy) * n, flat(x))
        return gx, gw[:, :, None, None].expand(*weight.shape)
    arguments: Any = (geometry.stride, (geometry.pads[0], geometry.pads[2]), geometry.dilation, False, (0, 0),
                      geometry.groups, (True, True, False))
    gx, gw, _ = torch.ops.aten.convolution_backward(flat(gy), flat(x), weight, None, *arguments)
    return flat(gx), gw
