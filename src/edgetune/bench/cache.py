"""Epochs from the second on, with the frozen part of the network cached and without.

The baseline runs all of the network in every epoch, by stock autograd with the same layers learning, in the faster
memory order; so is the pooled chain without a cache. Pictures lie decoded in memory and are seen as they are, so that
only the network's own time is saved: drawing views, or decoding files, would make the cached epoch look better.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import Field
from torch import nn

from edgetune.apply import apply
from edgetune.bench import timing
from edgetune.bench.steps import LAYOUTS, fastest
from edgetune.cache import Cache, Features, Sight, open_features
from edgetune.contract import Method
from edgetune.data import Augment, Dataset, Pictures, Preprocess, batches
from edgetune.data.source import Listing
from edgetune.errors import EdgetuneError
from edgetune.graph import Graph, trace
from edgetune.kernels import heap
from edgetune.loop import accumulate, cross_entropy
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import Taps
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models import load_model
from edgetune.plan import last_layers
from edgetune.record import Record

RATIOS = ("speedup", "method_speedup")


class CacheOptions(Record):
    """Which networks at which sizes; how many of the last convolutions learn (4: the last two blocks of MobileNetV2);
    what is kept, and where. `quick` is one round of the first codec.
    """

    models: tuple[str, ...] = ("mobilenet_v2",)
    sizes_px: tuple[int, ...] = (224,)
    depth: int = Field(4, ge=0)
    patch_px: tuple[int, ...] = (2, 4)
    taps: Taps = "mean"
    codecs: tuple[str, ...] = ("float32", "float16", "int8")
    keep: Literal["memory", "disk"] = "disk"
    pictures: int = Field(32, ge=1)
    classes: int = Field(10, ge=2)
    batch: int = Field(32, ge=1)
    threads: int = Field(1, ge=1)
    clock: timing.Clock = "cpu"
    rounds: int = Field(5, ge=1)
    device: str = "cpu"
    seed: int = 0
    quick: bool = False


def run(options: CacheOptions | None = None, progress: Callable[[timing.Row], None] | None = None) -> timing.Result:
    """Measure every network, size, method and codec; `progress` sees each row as soon as it is there."""
    options = options or CacheOptions()
    if options.quick:
        options = options.model_copy(update={"rounds": 1, "codecs": options.codecs[:1]})
    allocator = heap.keep_freed_memory()
    rows: list[timing.Row] = []
    with timing.threads(options.threads):
        for name in options.models:
            for size in options.sizes_px:
                for row in _rows(name, size, options):
                    row["allocator"] = allocator
                    rows.append(row)
                    if progress is not None:
                        progress(row)
    return timing.result(rows, options.device)


@dataclass(frozen=True)
class _Case:
    """A network, pictures for it, and where caches are kept."""

    model: nn.Module
    graph: Graph
    data: Dataset
    options: CacheOptions
    folder: Path

    def stock(self, layout: str) -> _Epoch:
        """Stock autograd, the same parameters learning."""
        model = self._copy(layout)
        learned = last_layers(self.graph, self.options.depth, Exact()).learned()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in learned)
        return _Epoch(model, self, layout, None)

    def planned(self, layout: str, method: Method, codec: str | None) -> _Epoch:
        """A planned network, its frozen part cached if a codec is named."""
        options, model = self.options, self._copy(layout)
        apply(model, last_layers(self.graph, options.depth, method), self.graph)
        if codec is None:
            return _Epoch(model, self, layout, None)
        sight = Sight(options.seed, None, options.batch, min(options.batch, options.pictures))
        folder = self.folder / f"{method.method}-{getattr(method, 'patch_px', 0)}-{layout}"
        cache = Cache(keep=options.keep, codec=codec)
        return _Epoch(model, self, layout, open_features(model.train(), self.data, cache, sight, folder, _refuse))

    def _copy(self, layout: str) -> nn.Module:
        model: nn.Module = copy.deepcopy(self.model).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        return model.eval()


def _refuse(sentence: str) -> None:
    raise EdgetuneError(sentence)


class _Epoch:
    """One network; a call trains it for an epoch (SGD with momentum)."""

    def __init__(self, model: nn.Module, case: _Case, layout: str, features: Features | None) -> None:
        self.model, self.case, self.layout, self.features = model, case, layout, features
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # a rate of almost nothing: many epochs on the same pictures must not run into infinities
        self.optimizer = torch.optim.SGD(learned, lr=1e-9, momentum=0.9, fused=True)
        self.epoch = 0

    def __call__(self) -> None:
        options = self.case.options
        for forward, x, y in self._batches():
            self.optimizer.zero_grad()
            accumulate(cross_entropy(forward), x, y.to(options.device), options.batch)
            self.optimizer.step()
        self.epoch += 1

    def _batches(self) -> Iterator[tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, torch.Tensor]]:
        options = self.case.options
        if self.features is not None:
            yield from self.features.batches(self.epoch)
            return
        for x, y in batches(self.case.data.train, options.batch, seed=options.seed, epoch=self.epoch):
            yield self.model, x.to(options.device).contiguous(memory_format=LAYOUTS[self.layout]), y


def _rows(name: str, size: int, options: CacheOptions) -> Iterator[timing.Row]:
    torch.manual_seed(options.seed)
    model = load_model(name, options.classes).to(options.device)
    x = torch.zeros((options.batch, 3, size, size), device=options.device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        case = _Case(model, trace(model, x), _pictures(size, options), options, Path(folder))
        methods: list[Method] = [Exact(), *(PooledChain(patch_px=r, taps=options.taps) for r in options.patch_px)]
        epochs = {f"stock {layout}": case.stock(layout) for layout in LAYOUTS}
        for number, method in enumerate(methods):
            for layout in LAYOUTS:
                for codec in (None, *options.codecs):
                    epochs[f"{number} {codec} {layout}"] = epoch = case.planned(layout, method, codec)
                    if epoch.features is not None:
                        stack.callback(epoch.features.close)
        ms, others = timing.interleave(epochs, rounds=options.rounds, device=options.device, clock=options.clock)
        for number, method in enumerate(methods):
            for codec in options.codecs:
                yield {**_row(name, size, options, others), **_found(number, method, codec, epochs, ms)}


def _row(name: str, size: int, options: CacheOptions, others: float) -> timing.Row:
    return {"case": f"{name}@{size} last {options.depth}", "model": name, "size_px": size, "depth": options.depth,
            "batch": options.batch, "pictures": options.pictures, "classes": options.classes,
            "keep": options.keep, "threads": options.threads,
            "device": options.device, "seed": options.seed, "clock": options.clock, "quick": options.quick,
            "load": timing.load_average(), "others": others}


def _found(number: int, method: Method, codec: str, epochs: dict[str, _Epoch], ms: dict[str, float]) -> timing.Row:
    """Milliseconds of an epoch: stock, and by this method with and without its cache."""
    stock, own, cached = (fastest(ms, what) for what in ("stock", f"{number} None", f"{number} {codec}"))
    baseline_ms, own_ms, method_ms = ms[f"stock {stock}"], ms[f"{number} None {own}"], ms[f"{number} {codec} {cached}"]
    features = epochs[f"{number} {codec} {cached}"].features
    assert features is not None
    return {"method": method.method, "patch_px": getattr(method, "patch_px", None),
            "taps": getattr(method, "taps", None), "codec": codec, "baseline_ms": baseline_ms,
            "uncached_ms": own_ms, "method_ms": method_ms, "speedup": baseline_ms / method_ms,
            "method_speedup": own_ms / method_ms, "baseline_layout": stock, "layout": cached,
            "sample_bytes": features.use.sample_bytes, "behind": ", ".join(features.use.layers),
            "hit_rate": features.use.hit_rate}


def _pictures(size: int, options: CacheOptions) -> Dataset:
    """Pictures of noise, decoded."""
    count = options.pictures
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    listing = Listing(tuple(f"{n}.png" for n in range(count)), (0,) * count, (0,) * count, _decoded_already)
    preprocess = Preprocess(size=(size, size))
    pictures = Pictures(listing, preprocess, None, pixels)
    return Dataset("noise", ("a", "b"), pictures, pictures, preprocess, Augment(), "noise")


def _decoded_already(index: int) -> Image.Image:
    raise AssertionError(f"picture {index} is in memory")
