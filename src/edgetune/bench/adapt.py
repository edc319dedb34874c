"""One cell of the transfer benchmark: a pretrained network, what of it learns and how, trained and tested.

Where only the last blocks learn, the frozen ones run once a photo and view, and their maps are trained from:
the gradients are the same, as nothing in front of the learning part changes.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.apply import apply
from edgetune.bench.cells import Line, cell_key, kept_for_backward, pack_bits
from edgetune.bench.photos import Maps, Photos, Split, behind, drifted_cifar, flowers
from edgetune.contract import Plan
from edgetune.data.chance import permutation
from edgetune.data.preprocess import Preprocess
from edgetune.graph import Graph, trace
from edgetune.models.head import replace_head
from edgetune.models.loading import load_weights
from edgetune.models.registry import load_model, model_card

WEIGHTS = {
    "mobilenet_v2_tf": "weights/mobilenet_v2_1.0_224_imagenet1001_dequant.safetensors",
    "resnet20": "weights/resnet20_cifar10.safetensors",
}
BATCH, MOMENTUM, CLIP, WARM_UP = 32, 0.9, 2.0, 0.2
SHARED_PREFIX = 15
"""Blocks of MobileNetV2 in front of every part that learns alone: their maps serve all of these."""
_QUICK = (200, 2)


@dataclass(frozen=True)
class Case:
    """What learns, on which photos: `first` is the first learning block of `features` (None: everything)."""

    name: str
    network: str
    size: int
    epochs: int
    first: int | None
    rates: tuple[float, ...]

    @property
    def fresh_head(self) -> bool:
        """Whether the photos have other classes than the weights were trained for."""
        return self.network != "resnet20"


@dataclass(frozen=True)
class Arm:
    """One method as a row: `plan` makes its plan of a graph; without one it is stock autograd.

    Stock autograd learns the norms' scales too where `scales` is set; nothing learns at all unless `trains`.
    """

    method: str
    plan: Callable[[Graph], Plan] | None = None
    patch_px: int | None = None
    taps: str | None = None
    scales: bool = True
    trains: bool = True

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this row from the others of its case."""
        return {"method": self.method, "patch_px": self.patch_px, "taps": self.taps}


@dataclass(frozen=True)
class Bench:
    """One case with its photos; `quick` takes few of them."""

    case: Case
    data: str
    quick: bool = False

    def photos(self) -> Photos:
        """The case's photos, decoded once a process."""
        return _photos(self.case.network, self.case.size, self.data, self.quick)

    def source(self) -> Maps | Photos:
        """What the learning part reads: photos, or their maps behind the frozen blocks."""
        return _maps(self)

    def learning_part(self, seed: int) -> nn.Module:
        """The part of the pretrained network that learns, in eval mode."""
        model = self._network(seed)
        if self.case.first is None:
            return model
        features, pool, head = (model.get_submodule(name) for name in ("features", "pool", "classifier"))
        return nn.Sequential(*list(features.children())[self.case.first :], pool, nn.Flatten(1), head).eval()

    def _network(self, seed: int) -> nn.Module:
        if not self.case.fresh_head:
            model = load_model(self.case.network)
            load_weights(model, Path(self.data) / WEIGHTS[self.case.network])
            return model
        model = load_model(self.case.network, dropout=0.0)
        load_weights(model, Path(self.data) / WEIGHTS[self.case.network])
        replace_head(model, 5, seed=seed)
        return model


@cache
def _photos(network: str, size: int, data: str, quick: bool) -> Photos:
    preprocess = Preprocess.from_input(model_card(network).input).model_copy(update={"size": (size, size)})
    make = drifted_cifar if network == "resnet20" else flowers
    return make(Path(data), preprocess, *(_QUICK if quick else ()))


@cache
def _maps(bench: Bench) -> Maps | Photos:
    case, photos = bench.case, bench.photos()
    if case.first is None:
        return photos
    model = bench._network(0)
    blocks, pool = list(model.get_submodule("features").children()), model.get_submodule("pool")
    name = f"{case.network}:features"
    shared = behind(photos, nn.Sequential(*blocks[:SHARED_PREFIX]), case.epochs, f"{name}:{SHARED_PREFIX}")
    if case.first == SHARED_PREFIX:
        return shared
    # the head reads means alone, and the learning part's own pooling leaves them as they are
    rest = blocks[SHARED_PREFIX : case.first] + ([pool] if case.first == len(blocks) else [])
    return behind(shared, nn.Sequential(*rest), case.epochs, f"{name}:{case.first}")


def adapt(bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
    """Train on one split and test: accuracy, right or wrong by photo, curve, bytes kept, seconds."""
    torch.manual_seed(seed)
    started, (train, test) = time.perf_counter(), split
    source, model, labels = bench.source(), bench.learning_part(seed), bench.photos().labels
    sample = source.seen(train[:BATCH], 0)
    _prepare(model, arm, sample)
    kept = kept_for_backward(model, sample)
    curve = _train(model, source, labels, train, bench.case.epochs, rate, seed) if arm.trains else []
    with torch.no_grad():
        logits = torch.cat([model(source.seen(part, None)) for part in _chunks(test, 100)])
    correct, loss = logits.argmax(1) == labels[test], F.cross_entropy(logits, labels[test])
    return {
        "accuracy": 100 * float(correct.double().mean()),
        "test_loss": float(loss.nan_to_num(1e9, 1e9)),
        "correct": pack_bits(correct),
        "tested": len(test),
        "test_set": cell_key({"photos": test}),
        "curve": curve,
        "kept_bytes": kept,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _prepare(model: nn.Module, arm: Arm, sample: torch.Tensor) -> None:
    if arm.plan is not None:
        graph = trace(model, sample)
        apply(model, arm.plan(graph), graph)
        return
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d) and not arm.scales:
            layer.weight.requires_grad_(False)
        if isinstance(layer, nn.Conv2d):  # the layout in which stock convolutions are faster
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def _train(
    model: nn.Module,
    source: Maps | Photos,
    labels: torch.Tensor,
    train: Sequence[int],
    epochs: int,
    rate: float,
    seed: int,
) -> list[Line]:
    """One-cycle SGD with clipping; mean loss, median gradient norm and step time, one entry an epoch."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=rate, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        rate,
        total_steps=epochs * len(_chunks(train, BATCH)),
        pct_start=WARM_UP,
        cycle_momentum=False,
    )
    history: list[Line] = []
    for epoch in range(epochs):
        order = [train[i] for i in permutation(len(train), "order", seed, epoch)]
        steps = []
        for chosen in _chunks(order, BATCH):
            steps.append(_step(model, source.seen(chosen, epoch), labels[chosen], optimizer, learned))
            schedule.step()
            if not math.isfinite(steps[-1][0]):
                return [*history, {"loss": None, "step": len(steps)}]  # diverged: nothing comes back from that
        losses, norms, times = zip(*steps, strict=True)
        history.append(
            {
                "loss": statistics.fmean(losses),
                "gradient_norm": statistics.median(norms),
                "step_ms": statistics.median(times),
            }
        )
    return history


def _step(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    learned: Sequence[nn.Parameter],
) -> tuple[float, float, float]:
    started = time.perf_counter()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(learned, CLIP)
    optimizer.step()
    return float(loss.detach()), float(norm), 1000 * (time.perf_counter() - started)


def _chunks(items: Sequence[int], size: int) -> list[list[int]]:
    return [list(items[first : first + size]) for first in range(0, len(items), size)]
