"""`edgetune bench transfer`: what adapting a pretrained network costs in accuracy, method by method.

MobileNetV2 from ImageNet on flowers5 (five folds over all photos), and ResNet-20 on a drifted CIFAR-10 (three
seeds). Within a fold every method starts from the same weights and sees the same batches. The learning rate
is chosen on plain back-propagation, on a part held out of the first fold's training photos, for every method.

"plain" is stock autograd with norms in eval: weights, norm scales and norm shifts learn. Filtered rows learn
weights and shifts, and those "with scales" the scales too; "plain, shifts only" tells what the scales alone are worth.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgetune.bench.adapt import BATCH, Arm, Bench, Case, adapt
from edgetune.bench.cells import (
    CellStore,
    Line,
    cell_key,
    mean_interval,
    paired_difference,
    provenance,
    unpack_bits,
)
from edgetune.bench.photos import inner_split
from edgetune.bench.published import PublishedFilter
from edgetune.contract import Method, Plan
from edgetune.graph import Graph
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.plan import last_layers
from edgetune.record import Record


class Options(Record):
    """What to run. `data` holds photos and weights; `cases` and `methods` pick some (None: all)."""

    data: str = os.environ.get("EDGETUNE_DATA", "../shared/data")
    out: str = "bench/results/transfer.jsonl"
    quick: bool = False
    threads: int = 1
    cases: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None


def everywhere(method: Method, scales: bool = False) -> Callable[[Graph], Plan]:
    """Every convolution by `method`; weights, shifts and the head learn, and with `scales` the norms' scales too."""
    return lambda graph: last_layers(graph, None, method, scales=scales)


def chain(patch_px: int, taps: str = "mean", scales: bool = False) -> Arm:
    """The pooled chain in every layer."""
    method = PooledChain.model_validate({"patch_px": patch_px, "taps": taps})
    name = "pooled chain" + (", with scales" if scales else "")
    return Arm(name, everywhere(method, scales), patch_px, taps, scales=scales)


def with_bases(patch_px: int, bases: int) -> Arm:
    """Layer by layer, with the first Walsh functions of each patch."""
    method = GradientFilter(patch_px=patch_px, bases=bases)
    return Arm(f"filter, {bases} bases", everywhere(method), patch_px, "mean", scales=False)


def published(patch_px: int) -> Arm:
    """The operator as published."""
    return Arm("published operator", everywhere(PublishedFilter(patch_px=patch_px)), patch_px, "mean", scales=False)


def exact_tail(patch_px: int, first_exact: int, scales: bool = False) -> Arm:
    """The pooled chain in front, exact gradients from block `first_exact` of `features` on.

    The last blocks have small maps, so that exactness costs few bytes there, and what they hand on is exact. With
    `scales` the norms of the exact blocks learn their scales too.
    """

    def plan(graph: Graph) -> Plan:
        filtered = everywhere(PooledChain(patch_px=patch_px))(graph)
        tail = tuple(f"features.{block}." for block in range(first_exact, 19))
        layers = {name: ((Exact(),) if name.startswith(tail) else stack) for name, stack in filtered.layers.items()}
        norms = {call.name for call in graph.layers("norm") if scales and call.name.startswith(tail)}
        learns = {name: (("weight", "bias") if name in norms else roles) for name, roles in filtered.learns.items()}
        return filtered.model_copy(update={"layers": layers, "learns": learns})

    name = f"chain, exact from block {first_exact}" + (", with scales" if scales else "")
    return Arm(name, plan, patch_px, "mean", scales=False)


PLAIN = Arm("plain")
SHIFTS = Arm("plain, shifts only", scales=False)
BEFORE = Arm("before", trains=False)

_FLOWERS = "mobilenet_v2_tf"
HEAD = Case("head only", _FLOWERS, 160, 5, 19, (0.02, 0.05, 0.1, 0.2))
LAST2 = Case("last 2 blocks", _FLOWERS, 160, 5, 17, (0.01, 0.02, 0.05))
LAST4 = Case("last 4 blocks", _FLOWERS, 160, 5, 15, (0.01, 0.02, 0.05))
ALL = Case("all layers", _FLOWERS, 96, 3, None, (0.01, 0.02))
CIFAR = Case("ResNet-20, all layers", "resnet20", 32, 3, None, (0.01, 0.02))
CASES = {case.name: case for case in (HEAD, LAST2, LAST4, ALL, CIFAR)}

_LAST = (chain(4), chain(2, "grid"), SHIFTS, published(2), with_bases(4, 3), chain(4, "grid"), chain(7))
GRID: tuple[tuple[Case, Arm], ...] = (
    (LAST4, PLAIN),
    (ALL, PLAIN),
    (LAST4, chain(2)),
    (ALL, chain(2)),
    (HEAD, PLAIN),
    (ALL, chain(4)),
    (ALL, exact_tail(2, 7)),
    (ALL, exact_tail(2, 7, scales=True)),
    *((CIFAR, arm) for arm in (BEFORE, PLAIN, chain(2))),
    *((LAST4, arm) for arm in _LAST[:4]),
    *((ALL, arm) for arm in (published(2), chain(2, "grid"), SHIFTS)),
    *((CIFAR, arm) for arm in (chain(2, "grid"), chain(4), published(2), SHIFTS)),
    *((case, chain(2, scales=True)) for case in (LAST4, ALL)),
    (ALL, exact_tail(2, 4, scales=True)),
    *((LAST4, arm) for arm in _LAST[4:]),
    *((case, chain(4, scales=True)) for case in (LAST4, ALL)),
    *((LAST2, arm) for arm in (PLAIN, chain(2), chain(4), chain(2, "grid"), published(2), chain(7))),
)
"""The default grid, the deciding rows first."""


def run(options: Options | None = None) -> dict[str, Any]:
    """Work through the cells that are not there yet, then summarise: {machine, versions, git, rows}.

    Several processes may run the same grid into one file: each takes cells that no other is at.
    """
    options = options or Options()
    torch.set_num_threads(options.threads)
    store = CellStore(options.out)
    chosen = [(case, arm) for case, arm in GRID if _asked_for(options, case, arm)]
    for case in dict.fromkeys(case for case, _ in chosen):
        for rate in case.rates:
            _search(store, Bench(case, options.data, options.quick), rate)
    for case, arm in chosen:
        bench = Bench(case, options.data, options.quick)
        for index in range(len(bench.photos().splits)):
            _cell(store, bench, arm, index)
    rows = summarise(options.out)
    store.replace("transfer", rows)
    return {**provenance(), "rows": rows}


def _asked_for(options: Options, case: Case, arm: Arm) -> bool:
    return (options.cases is None or case.name in options.cases) and (
        options.methods is None or arm.method in options.methods
    )


def _identity(bench: Bench, arm: Arm, run_index: int | None, searched_rate: float | None) -> Line:
    case = bench.case
    return {
        "case": case.name,
        **arm.identity,
        "size": case.size,
        "epochs": case.epochs,
        "network": case.network,
        "quick": bench.quick,
        "run": run_index,
        "searched_rate": searched_rate,
    }


def _search(store: CellStore, bench: Bench, rate: float) -> None:
    """Try one learning rate on plain; waits for a process that is at it, as every cell needs the outcome."""
    identity = _identity(bench, PLAIN, None, rate)
    with store.locked(cell_key(identity), wait=True):
        if not store.done(cell_key(identity)):
            result = adapt(bench, PLAIN, inner_split(bench.photos()), rate, 0)
            store.append(_line("transfer-search", identity, bench, rate, 0, result))


def _cell(store: CellStore, bench: Bench, arm: Arm, index: int) -> None:
    """Finish one cell, unless it is there or another process is at it."""
    identity = _identity(bench, arm, index, None)
    with store.locked(cell_key(identity), wait=False) as mine:
        if mine and not store.done(cell_key(identity)):
            rate = best_rate(store.lines(), bench)
            result = adapt(bench, arm, bench.photos().splits[index], rate, index)
            store.append(_line("transfer-cell", identity, bench, rate, index, result))


def _line(suite: str, identity: Line, bench: Bench, rate: float, seed: int, result: Line) -> Line:
    return {
        "suite": suite,
        "key": cell_key(identity),
        **identity,
        "rate": rate,
        "seed": seed,
        "batch": BATCH,
        "data": bench.photos().name,
        **result,
        **provenance(),
    }


def best_rate(lines: list[Line], bench: Bench) -> float:
    """The learning rate with the lowest loss on the held-out photos, of those tried for this case."""
    tried = [line for line in lines if line["suite"] == "transfer-search" and _of(line, bench.case, bench.quick)]
    return float(min(tried, key=lambda line: line["test_loss"])["rate"])


def _of(line: Line, case: Case, quick: bool) -> bool:
    wanted = (case.name, case.size, case.epochs, quick)
    return (line["case"], line["size"], line["epochs"], line["quick"]) == wanted


def summarise(path: str | Path) -> list[Line]:
    """The rows of the table, from the cells of a results file: means, and paired differences to plain.

    `difference_low` and `difference_high` are by photo (see `cells.paired_difference`); those that end in
    `_by_run` are Student's interval over folds or seeds. A row that lacks folds says so in `seeds`.
    """
    groups: dict[tuple[str, bool], dict[tuple[Any, ...], dict[int, Line]]] = {}
    for line in CellStore(path).lines():
        if line["suite"] != "transfer-cell" or line["case"] not in CASES:
            continue
        if _of(line, CASES[line["case"]], line["quick"]):
            rows = groups.setdefault((line["case"], line["quick"]), {})
            rows.setdefault((line["method"], line["patch_px"], line["taps"]), {})[line["run"]] = line
    order = {name: index for index, name in enumerate(CASES)}
    return [
        _row(cells, groups[key].get((PLAIN.method, None, None), {}))
        for key in sorted(groups, key=lambda key: (order[key[0]], key[1]))
        for cells in groups[key].values()
    ]


_SHARED = (
    *("case", "method", "patch_px", "taps", "network", "data", "size", "epochs", "batch", "rate", "quick"),
    *("kept_bytes", "machine", "git", "versions"),
)


def _row(cells: dict[int, Line], plain: dict[int, Line]) -> Line:
    last, accuracies = cells[max(cells)], [cell["accuracy"] for cell in cells.values()]
    row = {
        "suite": "transfer",
        **{name: last[name] for name in _SHARED},
        "accuracy_mean": statistics.fmean(accuracies),
        "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "seeds": len(accuracies),
    }
    common = sorted(cells.keys() & plain.keys())
    if not common or last["method"] == PLAIN.method:
        return row
    ours, theirs = ([unpack_bits(of[i]["correct"], of[i]["tested"]) for i in common] for of in (cells, plain))
    photos = [[f"{cells[i]['test_set']}:{n}" for n in range(cells[i]["tested"])] for i in common]
    by_photo = paired_difference(ours, theirs, photos)
    by_run = mean_interval([cells[i]["accuracy"] - plain[i]["accuracy"] for i in common])
    return {
        **row,
        "accuracy_difference": by_photo.mean,
        "difference_low": by_photo.low,
        "difference_high": by_photo.high,
        "difference_low_by_run": by_run.low,
        "difference_high_by_run": by_run.high,
        "kept_bytes_baseline": plain[common[0]]["kept_bytes"],
    }
