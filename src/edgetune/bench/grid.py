"""An accuracy bench as a grid: rows of case and arm, cells that are stored once they are finished, and a summary.

Within a run (fold or seed) every arm starts from the same weights and sees the same batches. The learning rate is
chosen on a part held out of the first run's training photos: on plain back-propagation for all arms of a case, and
anew for an arm with `rates` of its own, or on another arm that it names.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgetune.bench.arms import BATCH, Arm
from edgetune.bench.cases import Bench, Case
from edgetune.bench.cells import (
    CellStore,
    Line,
    cell_key,
    mean_interval,
    paired_difference,
    provenance,
    unpack_bits,
)
from edgetune.bench.photos import Split, inner_split
from edgetune.record import Record

SEEDS_APART = 100
"""From the seed of a split to that of the same split gone through once more."""
PLAIN = "plain"
"""The arm of every case that the others are compared with."""


class GridOptions(Record):
    """What to run. `data` holds photos and weights; `cases` and `methods` pick some (None: all)."""

    data: str = os.environ.get("EDGETUNE_DATA", "../shared/data")
    out: str
    quick: bool = False
    threads: int = 1
    cases: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None


Study = Callable[[Bench, Arm, Split, float, int], Line]
"""What a cell finds out, from a split, a learning rate and a seed."""


@dataclass(frozen=True)
class Grid:
    """A suite: cases in the order of its table, rows with the deciding ones first, what is found out in a cell.

    `search` is what is found out in trying a learning rate. `facts` are fields of a cell that its row has too, and
    `medians` those of which it has the median over the cells, with that of the `baseline` arm beside it; of those in
    `worst` it has the largest.
    """

    suite: str
    cases: tuple[Case, ...]
    rows: tuple[tuple[Case, Arm], ...]
    study: Study
    search: Study
    facts: tuple[str, ...] = ()
    medians: tuple[str, ...] = ()
    worst: tuple[str, ...] = ()
    baseline: str = PLAIN

    def plain(self, case: Case) -> Arm:
        """What the arms of a case are compared with."""
        return next(arm for other, arm in self.rows if other == case and arm.method == self.baseline)

    def run(self, options: GridOptions) -> dict[str, Any]:
        """Work through the cells that are not there yet, then summarise: {machine, versions, git, rows}.

        Several processes may run the same grid into one file: each takes cells that no other is at.
        """
        torch.set_num_threads(options.threads)
        store = CellStore(options.out)
        for case, arm in self.rows:
            if _asked_for(options, case, arm):
                bench = Bench(case, options.data, options.quick)
                self._choose_rate(store, bench, arm)
                for index in range(arm.repeats * len(bench.photos().splits)):
                    self._cell(store, bench, arm, index)
        rows = self.summarise(options.out)
        store.replace(self.suite, rows)
        return {**provenance(), "rows": rows}

    def _choose_rate(self, store: CellStore, bench: Bench, arm: Arm) -> None:
        """Try every learning rate, where there are several; waits for a process that is at one, as every cell needs
        the outcome."""
        tried = self._tried(bench.case, arm)
        rates = tried.rates or bench.case.rates
        for rate in rates if len(rates) > 1 else ():
            cell = identity(bench, tried, None, rate)
            with store.locked(cell_key(cell), wait=True):
                if not store.done(cell_key(cell)):
                    found = self.search(bench, tried, inner_split(bench.photos()), rate, 0)
                    store.append(_line(f"{self.suite}-search", cell, bench, rate, 0, found))

    def _tried(self, case: Case, arm: Arm) -> Arm:
        """The arm on which the learning rate of `arm` is chosen."""
        return arm if arm.rates else arm.rate_of or self.plain(case)

    def _cell(self, store: CellStore, bench: Bench, arm: Arm, index: int) -> None:
        """Finish one cell, unless it is there or another process is at it."""
        cell = identity(bench, arm, index, None)
        with store.locked(cell_key(cell), wait=False) as mine:
            if mine and not store.done(cell_key(cell)):
                rate = self.best_rate(store.lines(), bench, arm)
                splits = bench.photos().splits
                again, split = divmod(index, len(splits))
                seed = split + SEEDS_APART * again
                found = self.study(bench, arm, splits[split], rate, seed)
                store.append(_line(f"{self.suite}-cell", cell, bench, rate, seed, found))

    def best_rate(self, lines: list[Line], bench: Bench, arm: Arm) -> float:
        """The learning rate with the lowest loss on the held-out photos, of those tried for this arm."""
        rates = self._tried(bench.case, arm).rates or bench.case.rates
        if len(rates) == 1:
            return rates[0]
        wanted = self._tried(bench.case, arm).identity
        tried = [
            line
            for line in lines
            if line["suite"] == f"{self.suite}-search"
            and _of(line, bench.case, bench.quick)
            and {name: line[name] for name in wanted} == wanted
        ]
        return float(min(tried, key=lambda line: line["test_loss"])["rate"])

    def summarise(self, path: str | Path) -> list[Line]:
        """The rows of the table, from the cells of a results file: means, and paired differences to plain.

        `difference_low` and `difference_high` are by photo (see `cells.paired_difference`); those that end in
        `_by_run` are Student's interval over folds or seeds. A row that lacks runs says so in `seeds`.
        """
        cases = {case.name: case for case in self.cases}
        groups: dict[tuple[str, bool], dict[tuple[Any, ...], dict[int, Line]]] = {}
        for line in CellStore(path).lines():
            if line["suite"] != f"{self.suite}-cell" or line["case"] not in cases:
                continue
            if _of(line, cases[line["case"]], line["quick"]):
                rows = groups.setdefault((line["case"], line["quick"]), {})
                rows.setdefault((line["method"], line["patch_px"], line["taps"]), {})[line["run"]] = line
        order = {name: index for index, name in enumerate(cases)}
        return [
            self._row(cells, groups[key].get((self.baseline, None, None), {}))
            for key in sorted(groups, key=lambda key: (order[key[0]], key[1]))
            for cells in groups[key].values()
        ]

    def _row(self, cells: dict[int, Line], plain: dict[int, Line]) -> Line:
        last, accuracies = cells[max(cells)], [cell["accuracy"] for cell in cells.values()]
        row = {
            "suite": self.suite,
            **{name: last[name] for name in (*_SHARED, *self.facts)},
            **_over(cells, self.medians, statistics.median),
            **_over(cells, self.worst, max),
            "accuracy_mean": statistics.fmean(accuracies),
            "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "seeds": len(accuracies),
        }
        common = sorted(cells.keys() & plain.keys())
        if not common or last["method"] == self.baseline:
            return row
        beside = {"kept_bytes": plain[common[0]]["kept_bytes"], **_over(plain, self.medians, statistics.median)}
        return {**row, **_compared(cells, plain, common), **{f"{name}_baseline": n for name, n in beside.items()}}


_SHARED = (
    *("case", "method", "patch_px", "taps", "network", "data", "size", "epochs", "batch", "rate", "quick"),
    *("kept_bytes", "machine", "git", "versions"),
)


def _asked_for(options: GridOptions, case: Case, arm: Arm) -> bool:
    return (options.cases is None or case.name in options.cases) and (
        options.methods is None or arm.method in options.methods
    )


def identity(bench: Bench, arm: Arm, run_index: int | None, searched_rate: float | None) -> Line:
    """What a cell is; its key is made of this, so that a change here would orphan every stored cell."""
    return {
        "case": bench.case.name,
        **arm.identity,
        **bench.case.identity,
        "quick": bench.quick,
        "run": run_index,
        "searched_rate": searched_rate,
    }


def _line(suite: str, cell: Line, bench: Bench, rate: float, seed: int, found: Line) -> Line:
    return {
        "suite": suite,
        "key": cell_key(cell),
        **cell,
        "rate": rate,
        "seed": seed,
        "batch": BATCH,
        "data": bench.photos().name,
        **found,
        **provenance(),
    }


def _of(line: Line, case: Case, quick: bool) -> bool:
    wanted = {"case": case.name, **case.identity, "quick": quick}
    return {name: line[name] for name in wanted} == wanted


def _over(cells: dict[int, Line], names: tuple[str, ...], said: Callable[[list[Any]], Any]) -> Line:
    """What is `said` over the cells that have a number; names that no cell has are left out."""
    found = {name: [cell[name] for cell in cells.values() if cell.get(name) is not None] for name in names}
    return {name: said(values) for name, values in found.items() if values}


def _compared(cells: dict[int, Line], plain: dict[int, Line], common: list[int]) -> Line:
    """The paired difference to plain over the runs that both have."""
    ours, theirs = ([unpack_bits(of[i]["correct"], of[i]["tested"]) for i in common] for of in (cells, plain))
    photos = [[f"{cells[i]['test_set']}:{n}" for n in range(cells[i]["tested"])] for i in common]
    by_photo = paired_difference(ours, theirs, photos)
    by_run = mean_interval([cells[i]["accuracy"] - plain[i]["accuracy"] for i in common])
    return {
        "accuracy_difference": by_photo.mean,
        "difference_low": by_photo.low,
        "difference_high": by_photo.high,
        "difference_low_by_run": by_run.low,
        "difference_high_by_run": by_run.high,
    }
