"""`edgetune bench transfer`: what adapting a pretrained network costs in accuracy, method by method.

MobileNetV2 from ImageNet on flowers5 (five folds over all photos), and ResNet-20 on a drifted CIFAR-10 (three seeds).
Within a fold every method starts from the same weights and sees the same batches. The learning rate is chosen on
plain back-propagation, on a part held out of the first fold's training photos, and used for every method.
"""

from __future__ import annotations

import os
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
from edgetune.bench.cells import (
    CellStore,
    Line,
    cell_key,
    kept_for_backward,
    mean_interval,
    pack_bits,
    paired_difference,
    provenance,
    unpack_bits,
)
from edgetune.bench.photos import Maps, Photos, Split, behind, drifted_cifar, flowers, inner_split
from edgetune.bench.published import PublishedFilter
from edgetune.contract import Method, Plan
from edgetune.data.chance import permutation
from edgetune.data.preprocess import Preprocess
from edgetune.graph import Graph, trace
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models.head import replace_head
from edgetune.models.loading import load_weights
from edgetune.models.registry import load_model, model_card
from edgetune.plan import last_layers
from edgetune.record import Record

MOBILENET = "weights/mobilenet_v2_1.0_224_imagenet1001_dequant.safetensors"
RESNET = "weights/resnet20_cifar10.safetensors"
BATCH, MOMENTUM, CLIP, WARM_UP = 32, 0.9, 2.0, 0.2


class Options(Record):
    """What to run. `data` holds the shared photos and weights; `cases` and `methods` pick some (None: all)."""

    data: str = os.environ.get("EDGETUNE_DATA", "../shared/data")
    out: str = "bench/results/transfer.jsonl"
    quick: bool = False
    threads: int = 1
    cases: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Arm:
    """One method as a row: `plan` makes the plan of a graph; None is stock autograd, which learns what `learns` picks."""

    method: str
    plan: Callable[[Graph], Plan] | None = None
    patch_px: int | None = None
    taps: str | None = None
    scales: bool = True
    trains: bool = True

    @property
    def identity(self) -> Line:
        """What tells this row from the others of its case."""
        return {"method": self.method, "patch_px": self.patch_px, "taps": self.taps}


@dataclass(frozen=True)
class Case:
    """What learns, on which photos: `first` is the first learning block of a Sequential `features` (None: everything)."""

    name: str
    network: str
    size: int
    epochs: int
    first: int | None
    rates: tuple[float, ...]


def everywhere(method: Method) -> Callable[[Graph], Plan]:
    """Every convolution by `method`; weights, shifts and the head learn."""
    return lambda graph: last_layers(graph, None, method)


def chain(patch_px: int, taps: str = "mean") -> Arm:
    """The pooled chain in every layer."""
    return Arm("pooled chain", everywhere(PooledChain.model_validate({"patch_px": patch_px, "taps": taps})),
               patch_px, taps, scales=False)


def with_bases(patch_px: int, bases: int) -> Arm:
    """Layer by layer, with the first Walsh functions of each patch."""
    return Arm(f"filter, {bases} bases", everywhere(GradientFilter(patch_px=patch_px, bases=bases)), patch_px, "mean",
               scales=False)


def published(patch_px: int) -> Arm:
    """The operator as published."""
    return Arm("published operator", everywhere(PublishedFilter(patch_px=patch_px)), patch_px, "mean", scales=False)


PLAIN = Arm("plain")
SHIFTS = Arm("plain, shifts only", scales=False)
BEFORE = Arm("before", trains=False)

FLOWERS = "mobilenet_v2_tf"
HEAD = Case("head only", FLOWERS, 160, 5, 19, (0.02, 0.05, 0.1, 0.2))
LAST2 = Case("last 2 blocks", FLOWERS, 160, 5, 17, (0.01, 0.02, 0.05))
LAST4 = Case("last 4 blocks", FLOWERS, 160, 5, 15, (0.01, 0.02, 0.05))
ALL = Case("all layers", FLOWERS, 96, 4, None, (0.01, 0.02, 0.05))
CIFAR = Case("ResNet-20, all layers", "resnet20", 32, 3, None, (0.005, 0.01, 0.02))
CASES = {case.name: case for case in (HEAD, LAST2, LAST4, ALL, CIFAR)}

_LAST = (chain(4), chain(2, "grid"), SHIFTS, published(2), with_bases(4, 3), chain(4, "grid"), chain(7))
GRID: tuple[tuple[Case, Arm], ...] = (
    (LAST4, PLAIN), (ALL, PLAIN), (LAST4, chain(2)), (ALL, chain(2)), (HEAD, PLAIN), (ALL, chain(2, "grid")),
    (CIFAR, BEFORE), (CIFAR, PLAIN), (CIFAR, chain(2)),
    *((LAST4, arm) for arm in _LAST[:4]), (ALL, chain(4)), (ALL, published(2)), (ALL, SHIFTS),
    (CIFAR, chain(2, "grid")), (CIFAR, chain(4)), (CIFAR, published(2)), (CIFAR, SHIFTS),
    *((LAST4, arm) for arm in _LAST[4:]),
    (LAST2, PLAIN), (LAST2, chain(2)), *((LAST2, arm) for arm in _LAST),
)
"""The default grid, the deciding rows first."""

_QUICK_PHOTOS = 200


def run(options: Options | None = None) -> dict[str, Any]:
    """Work through the cells that are not there yet, then summarise: {machine, versions, git, rows}."""
    options = options or Options()
    torch.set_num_threads(options.threads)
    store = CellStore(options.out)
    chosen = [(case, arm) for case, arm in GRID if (options.cases is None or case.name in options.cases)
              and (options.methods is None or arm.method in options.methods)]
    for case in dict.fromkeys(case for case, _ in chosen):
        for rate in case.rates:
            _cell(store, options, case, PLAIN, None, rate)
    for case, arm in chosen:
        for run_index in range(len(_photos(case.name, options.data, options.quick).splits)):
            _cell(store, options, case, arm, run_index, None)
    rows = summarise(options.out)
    store.replace("transfer", rows)
    return {**provenance(), "rows": rows}


def _cell(store: CellStore, options: Options, case: Case, arm: Arm, run_index: int | None, rate: float | None) -> None:
    """Finish one cell unless it is there or another process is at it. `run_index` None is the search of the rate."""
    identity = {"case": case.name, **arm.identity, "size": case.size, "epochs": case.epochs, "network": case.network,
                "quick": options.quick, "run": run_index, "searched_rate": rate}
    key = cell_key(identity)
    with store.locked(key, wait=run_index is None) as mine:
        if not mine or store.done(key):
            return
        photos = _photos(case.name, options.data, options.quick)
        chosen = _best_rate(store, case, options.quick) if rate is None else rate
        split = inner_split(photos) if run_index is None else photos.splits[run_index]
        result = _adapt(case, arm, options, split, chosen, run_index or 0)
        suite = "transfer-search" if run_index is None else "transfer-cell"
        store.append({"suite": suite, "key": key, **identity, "rate": chosen, "seed": run_index or 0,
                      "batch": BATCH, "data": photos.name, **result, **provenance()})


def _best_rate(store: CellStore, case: Case, quick: bool) -> float:
    tried = [line for line in store.lines() if line["suite"] == "transfer-search" and line["case"] == case.name
             and line["quick"] == quick and line["epochs"] == case.epochs]
    return float(min(tried, key=lambda line: line["test_loss"])["rate"])


@cache
def _photos(case_name: str, data: str, quick: bool) -> Photos:
    case, root = CASES[case_name], Path(data)
    preprocess = Preprocess.from_input(model_card(case.network).input).model_copy(
        update={"size": (case.size, case.size)})
    if case.network == "resnet20":
        return drifted_cifar(root, preprocess, *((_QUICK_PHOTOS, 2) if quick else ()))
    return flowers(root, preprocess, *((_QUICK_PHOTOS, 2) if quick else ()))


@cache
def _maps(case_name: str, data: str, quick: bool) -> Maps | Photos:
    """What the learning part of a case reads: photos, or their maps behind the frozen blocks."""
    case, photos = CASES[case_name], _photos(case_name, data, quick)
    if case.first is None:
        return photos
    network = _network(case, data, 0)
    features, pool = network.get_submodule("features"), network.get_submodule("pool")
    assert isinstance(features, nn.Sequential) and LAST4.first is not None
    shared = behind(photos, features[:LAST4.first], case.epochs, f"{case.network}:features:{LAST4.first}")
    if case.first == LAST4.first:
        return shared
    # the head reads means alone, and the learning part's own pooling leaves them as they are
    rest = [*features[LAST4.first:case.first], *([pool] if case.first == len(features) else [])]
    return behind(shared, nn.Sequential(*rest), case.epochs, f"{case.network}:features:{case.first}")


def _network(case: Case, data: str, seed: int) -> nn.Module:
    """The pretrained network, with a fresh head where the classes differ."""
    if case.network == "resnet20":
        model = load_model("resnet20")
        load_weights(model, Path(data) / RESNET)
        return model
    model = load_model(case.network, dropout=0.0)
    load_weights(model, Path(data) / MOBILENET)
    replace_head(model, 5, seed=seed)
    return model


def _learning_part(case: Case, data: str, seed: int) -> nn.Module:
    model = _network(case, data, seed)
    if case.first is None:
        return model
    features, pool, head = (model.get_submodule(name) for name in ("features", "pool", "classifier"))
    assert isinstance(features, nn.Sequential)
    return nn.Sequential(*features[case.first:], pool, nn.Flatten(1), head).eval()


def _adapt(case: Case, arm: Arm, options: Options, split: Split, rate: float, seed: int) -> Line:
    """Train the learning part on one split and test it: accuracy, right or wrong by photo, bytes kept, times."""
    torch.manual_seed(seed)
    started, photos = time.perf_counter(), _photos(case.name, options.data, options.quick)
    source, model = _maps(case.name, options.data, options.quick), _learning_part(case, options.data, seed)
    (train, test), labels = split, photos.labels
    sample = source.seen(train[:BATCH], 0)
    if arm.plan is not None:
        graph = trace(model, sample)
        apply(model, arm.plan(graph), graph)
    elif not arm.scales:
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.requires_grad_(False)
    kept = kept_for_backward(model, sample)
    curve = _train(model, source, labels, train, case.epochs, rate, seed) if arm.trains else []
    with torch.no_grad():
        logits = torch.cat([model(source.seen(part, None)) for part in _chunks(test, 100)])
    correct = logits.argmax(1) == labels[test]
    return {"accuracy": 100 * float(correct.double().mean()), "test_loss": float(F.cross_entropy(logits, labels[test]).nan_to_num(1e9, 1e9)),
            "correct": pack_bits(correct), "tested": len(test), "test_set": cell_key({"photos": test}),
            "curve": curve, "kept_bytes": kept, "seconds": round(time.perf_counter() - started, 1)}


def _train(model: nn.Module, source: Maps | Photos, labels: torch.Tensor, train: Sequence[int], epochs: int,
           rate: float, seed: int) -> list[Line]:
    """One-cycle SGD with clipping; mean loss, median norm of the gradient and median step time, one an epoch."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=rate, momentum=MOMENTUM)
    steps = epochs * len(range(0, len(train), BATCH))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=WARM_UP,
                                                   cycle_momentum=False)
    history = []
    for epoch in range(epochs):
        order = [train[i] for i in permutation(len(train), "order", seed, epoch)]
        steps_taken = [_step(model, source.seen(photos, epoch), labels[photos], optimizer, schedule, learned)
                       for photos in _chunks(order, BATCH)]
        losses, norms, times = zip(*steps_taken, strict=True)
        history.append({"loss": statistics.fmean(losses), "gradient_norm": statistics.median(norms),
                        "step_ms": statistics.median(times)})
    return history


def _step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, optimizer: torch.optim.Optimizer,
          schedule: torch.optim.lr_scheduler.LRScheduler, learned: Sequence[nn.Parameter]) -> tuple[float, float, float]:
    started = time.perf_counter()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(learned, CLIP)
    optimizer.step()
    schedule.step()
    return float(loss.detach()), float(norm), 1000 * (time.perf_counter() - started)


def _chunks(items: Sequence[int], size: int) -> list[list[int]]:
    return [list(items[first:first + size]) for first in range(0, len(items), size)]


def summarise(path: str | Path) -> list[Line]:
    """The rows of the table, from the cells of a results file: means, and differences to plain on the same photos."""
    groups: dict[tuple[Any, ...], dict[int, Line]] = {}
    for line in CellStore(path).lines():
        if line["suite"] == "transfer-cell" and _current(line):
            key = (line["case"], line["method"], line["patch_px"], line["taps"], line["quick"])
            groups.setdefault(key, {})[line["run"]] = line
    order = {case: index for index, case in enumerate(CASES)}
    return [_row(cells, groups.get((key[0], PLAIN.method, None, None, key[4]), {}))
            for key, cells in sorted(groups.items(), key=lambda item: order[item[0][0]])]


def _current(line: Line) -> bool:
    case = CASES.get(line["case"])
    return case is not None and (line["epochs"], line["size"]) == (case.epochs, case.size)


def _row(cells: dict[int, Line], plain: dict[int, Line]) -> Line:
    last, accuracies = cells[max(cells)], [cell["accuracy"] for cell in cells.values()]
    row = {"suite": "transfer", **{name: last[name] for name in (
        "case", "method", "patch_px", "taps", "network", "data", "size", "epochs", "batch", "rate", "quick",
        "kept_bytes", "machine", "git", "versions")},
        "accuracy_mean": statistics.fmean(accuracies), "seeds": len(accuracies),
        "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None}
    common = sorted(cells.keys() & plain.keys())
    if not common or last["method"] == PLAIN.method:
        return row
    bits = [[unpack_bits(of[run]["correct"], of[run]["tested"]) for run in common] for of in (cells, plain)]
    photos = [[f"{cells[run]['test_set']}:{i}" for i in range(cells[run]["tested"])] for run in common]
    by_photo = paired_difference(*bits, photos)
    by_run = mean_interval([cells[run]["accuracy"] - plain[run]["accuracy"] for run in common])
    return {**row, "accuracy_difference": by_photo.mean, "difference_low": by_photo.low,
            "difference_high": by_photo.high, "difference_low_by_run": by_run.low,
            "difference_high_by_run": by_run.high, "kept_bytes_baseline": plain[common[0]]["kept_bytes"]}
