"""Grids: what cells are known by never changes, a stopped grid goes on, every arm gets the rate it should."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from edgetune.bench import transfer
from edgetune.bench.arms import Arm, chain, stock
from edgetune.bench.cases import DIGITS_NET, Bench, Case
from edgetune.bench.cells import CellStore, Line, cell_key, pack_bits
from edgetune.bench.grid import Grid, GridOptions, identity
from edgetune.bench.photos import Split, inner_split

STORED = Path(__file__).resolve().parents[2] / "bench" / "results" / "transfer.jsonl"


def key(case: Case, arm: Arm, run: int | None, rate: float | None = None, quick: bool = False) -> str:
    return cell_key(identity(Bench(case, "anywhere", quick), arm, run, rate))


@pytest.mark.parametrize(
    ("case", "arm", "run", "rate", "expected"),
    [
        (transfer.ALL, transfer.PLAIN, None, 0.01, "a7daf563d58db47f"),
        (transfer.ALL, transfer.PLAIN, None, 0.02, "83f77fd0c81a063e"),
        (transfer.LAST4, transfer.PLAIN, 1, None, "73d2f4339363ce8e"),
        (transfer.LAST4, chain(2), 1, None, "11dab0c336036d4b"),
        (transfer.ALL, transfer.published(2), 1, None, "957c775ad2bad72c"),
        (transfer.CIFAR, transfer.BEFORE, 1, None, "7461f268004d6cb8"),
    ],
)
def test_keys_of_stored_cells_do_not_change(
    case: Case, arm: Arm, run: int | None, rate: float | None, expected: str
) -> None:
    assert key(case, arm, run, rate) == expected


def test_every_stored_cell_of_the_transfer_grid_is_found_again() -> None:
    arms = {(case.name, *arm.identity.values()): (case, arm) for case, arm in transfer.ROWS}
    checked = 0
    for line in CellStore(STORED).lines():
        case, arm = arms.get((line["case"], line["method"], line["patch_px"], line["taps"]), (None, None))
        if line["suite"] == "transfer" or case is None or line["epochs"] != case.epochs or line["quick"]:
            continue
        assert key(case, arm, line["run"], line["searched_rate"]) == line["key"]
        checked += 1
    assert checked >= 80


def test_the_stored_rows_are_those_of_the_stored_cells() -> None:
    stored = [line for line in CellStore(STORED).lines() if line["suite"] == "transfer"]
    found = {(row["case"], row["method"], row["patch_px"], row["taps"]): row for row in transfer.summarise(STORED)}
    for row in stored:
        again = found[row["case"], row["method"], row["patch_px"], row["taps"]]
        assert again["accuracy_mean"] == pytest.approx(row["accuracy_mean"])
        assert again["seeds"] >= row["seeds"]


BEST = {"plain": 0.1, "of its own": 3.0}
CASE = Case("drawn", DIGITS_NET, 32, 1, None, (0.01, 0.1))
OWN = Arm("of its own", stock(), rates=(0.3, 3.0))
ARMS = (Arm("plain", stock()), Arm("as plain", stock()), OWN, Arm("as another", stock(), rate_of=OWN))


@dataclass
class Fake:
    """Stands in for training: remembers what it was asked for, and is stopped at a given call."""

    stop_at: int | None = None
    asked: list[tuple[str, str, float, int]] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)

    def search(self, bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
        return self._found("search", arm, split, rate, seed) | {"test_loss": abs(rate - BEST[arm.method])}

    def study(self, bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
        return self._found("cell", arm, split, rate, seed) | {"peak_bytes": 10 + seed, "apart": seed, "threads": 1}

    def _found(self, what: str, arm: Arm, split: Split, rate: float, seed: int) -> Line:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append((what, arm.method, rate, seed))
        self.splits.append(split)
        correct = torch.tensor([True, arm.method == "plain", seed == 0, False])
        facts = {"tested": 4, "test_set": "same", "kept_bytes": 5 if arm.method == "plain" else 3}
        return {"accuracy": 100 * float(correct.double().mean()), "correct": pack_bits(correct), **facts}

    def grid(self) -> Grid:
        rows = tuple((CASE, arm) for arm in ARMS)
        facts: dict[str, tuple[str, ...]] = {
            "facts": ("threads",),
            "medians": ("peak_bytes", "nowhere"),
            "worst": ("apart", "nowhere"),
        }
        return Grid("fake", (CASE,), rows, study=self.study, search=self.search, **facts)


def options(path: Path, **more: object) -> GridOptions:
    return GridOptions.model_validate({"out": str(path / "fake.jsonl"), "quick": True, **more})


def test_every_arm_trains_at_the_rate_that_is_best_where_it_should_be_searched(tmp_path: Path) -> None:
    fake = Fake()
    fake.grid().run(options(tmp_path))
    cells = [asked[1:] for asked in fake.asked if asked[0] == "cell"]
    expected = {"plain": 0.1, "as plain": 0.1, "of its own": 3.0, "as another": 3.0}
    assert cells == [(arm.method, expected[arm.method], run) for arm in ARMS for run in (0, 1)]
    searched = [asked[1:3] for asked in fake.asked if asked[0] == "search"]
    assert searched == [("plain", 0.01), ("plain", 0.1), ("of its own", 0.3), ("of its own", 3.0)]
    photos = Bench(CASE, "", quick=True).photos()
    for asked, split in zip(fake.asked, fake.splits, strict=True):
        assert split == (inner_split(photos) if asked[0] == "search" else photos.splits[asked[3]])


@pytest.mark.parametrize("stop_at", [0, 1, 3, 6, 9])
def test_a_stopped_grid_goes_on_and_runs_nothing_twice(tmp_path: Path, stop_at: int) -> None:
    first, second, third = Fake(stop_at=stop_at), Fake(), Fake()
    with pytest.raises(KeyboardInterrupt):
        first.grid().run(options(tmp_path))
    found = second.grid().run(options(tmp_path))
    both = first.asked + second.asked
    assert len(first.asked) == stop_at and len(both) == len(set(both)) == 12
    assert third.grid().run(options(tmp_path))["rows"] == found["rows"]
    assert third.asked == []


def test_rows_have_medians_extremes_facts_and_plain_beside_them(tmp_path: Path) -> None:
    rows = Fake().grid().run(options(tmp_path))["rows"]
    assert [row["method"] for row in rows] == [arm.method for arm in ARMS]
    assert all(row["threads"] == 1 and row["peak_bytes"] == 10.5 and row["seeds"] == 2 for row in rows)
    assert all(row["apart"] == 1 and "nowhere" not in row for row in rows)
    plain, ours, *_ = rows
    assert "accuracy_difference" not in plain and "peak_bytes_baseline" not in plain
    # of four photos the second is lost in both runs
    assert ours["accuracy_difference"] == -25 and ours["difference_low"] < -25 < ours["difference_high"]
    assert (ours["kept_bytes"], ours["kept_bytes_baseline"], ours["peak_bytes_baseline"]) == (3, 5, 10.5)


def test_a_part_of_the_grid_can_be_asked_for(tmp_path: Path) -> None:
    fake = Fake()
    fake.grid().run(options(tmp_path, methods=("of its own",)))
    assert {asked[1] for asked in fake.asked} == {"of its own"}
    fake.grid().run(options(tmp_path, cases=("another",)))
    assert len(fake.asked) == 4


def test_an_arm_may_go_through_its_splits_again_with_other_seeds(tmp_path: Path) -> None:
    fake = Fake()
    twice = replace(ARMS[0], repeats=2)
    grid = replace(fake.grid(), rows=((CASE, twice), (CASE, ARMS[1])))
    plain, ours = grid.run(options(tmp_path))["rows"]
    cells = [
        (asked[3], split)
        for asked, split in zip(fake.asked, fake.splits, strict=True)
        if asked[:2] == ("cell", "plain")
    ]
    splits = Bench(CASE, "", quick=True).photos().splits
    assert cells == [(0, splits[0]), (1, splits[1]), (100, splits[0]), (101, splits[1])]
    assert (plain["seeds"], ours["seeds"]) == (4, 2)
