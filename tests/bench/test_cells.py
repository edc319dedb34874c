"""Cells: kills, resumption and several processes; statistics against scipy and numbers worked out by hand."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

from edgetune.bench.cells import (
    CellStore,
    cell_key,
    kept_for_backward,
    mean_interval,
    pack_bits,
    paired_difference,
    student_quantile,
    unpack_bits,
)

WORKER = """
import sys, time
from edgetune.bench.cells import CellStore
store = CellStore(sys.argv[1])
for number in range(6):
    with store.locked(f"cell{number}", wait=False) as mine:
        if mine and not store.done(f"cell{number}"):
            time.sleep(0.3)
            store.append({"suite": "s", "key": f"cell{number}", "by": sys.argv[2]})
"""


def worker(path: Path, name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORKER, str(path), name])


def keys(path: Path) -> list[str]:
    return [line["key"] for line in CellStore(path).lines()]


def test_a_killed_grid_goes_on_and_runs_nothing_twice(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    first = worker(path, "killed")
    for _ in range(600):
        if len(keys(path)) >= 2:
            break
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = CellStore(path).lines()
    assert 2 <= len(before) < 6
    assert worker(path, "resumed").wait() == 0
    after = CellStore(path).lines()
    assert after[: len(before)] == before
    assert sorted(keys(path)) == [f"cell{number}" for number in range(6)]


def test_two_processes_share_a_grid_without_running_a_cell_twice(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    both = [worker(path, name) for name in ("a", "b")]
    assert [process.wait() for process in both] == [0, 0]
    assert worker(path, "last").wait() == 0  # a cell that both left to each other
    assert sorted(keys(path)) == [f"cell{number}" for number in range(6)]


def test_a_line_cut_short_is_dropped_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    store = CellStore(path)
    store.append({"suite": "s", "key": "whole"})
    with path.open("a") as file:
        file.write('{"suite": "s", "key": "cut')
    assert keys(path) == ["whole"]
    store.append({"suite": "s", "key": "next"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["whole", "next"]


def test_rows_of_one_suite_are_replaced_and_cells_stay(tmp_path: Path) -> None:
    store = CellStore(tmp_path / "cells.jsonl")
    store.append({"suite": "cell", "key": "a"})
    store.replace("row", [{"suite": "row", "n": 1}])
    store.replace("row", [{"suite": "row", "n": 2}])
    assert store.lines() == [{"suite": "cell", "key": "a"}, {"suite": "row", "n": 2}]


def test_a_key_depends_on_what_the_cell_is_alone() -> None:
    assert cell_key({"a": 1, "b": None}) == cell_key({"b": None, "a": 1})
    assert len({cell_key({"a": value}) for value in (1, 2, None, "1")}) == 4


@pytest.mark.parametrize("count", [1, 7, 8, 9, 400])
def test_bits_come_back(count: int) -> None:
    correct = torch.rand(count) < 0.7
    assert torch.equal(unpack_bits(pack_bits(correct), count), correct)


@pytest.mark.parametrize("degrees", [1, 2, 4, 9, 30, 1999])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_student_quantiles_are_scipys(degrees: int, level: float) -> None:
    assert student_quantile(level, degrees) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-6)


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = [0.3, -1.2, 0.8, 0.1, -0.4]
    found = mean_interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert math.isinf(mean_interval([1.0]).high)


def test_paired_differences_are_mcnemars_counts() -> None:
    n, ours_only, theirs_only = 200, 14, 6
    ours, theirs = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    ours[:100] = theirs[:100] = True
    ours[100 : 100 + ours_only] = True
    theirs[120 : 120 + theirs_only] = True
    halves = [slice(0, 110), slice(110, n)]
    photos = [[str(i) for i in range(n)[half]] for half in halves]
    found = paired_difference([ours[half] for half in halves], [theirs[half] for half in halves], photos)
    mean = (ours_only - theirs_only) / n
    deviation = math.sqrt((ours_only + theirs_only - n * mean**2) / (n - 1))
    reach = stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n)
    assert found.mean == pytest.approx(100 * mean)
    assert (found.low, found.high) == pytest.approx((100 * (mean - reach), 100 * (mean + reach)))


def test_a_photo_tested_by_two_seeds_counts_once() -> None:
    yes, no = torch.tensor([True, True, False]), torch.tensor([False, True, False])
    photos = [["a", "b", "c"]] * 2
    twice = paired_difference([yes, yes], [no, no], photos)
    once = paired_difference([yes], [no], photos[:1])
    assert (twice.low, twice.mean, twice.high) == pytest.approx((once.low, once.mean, once.high))


def test_kept_bytes_count_each_storage_once_and_no_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    x = torch.randn(4, 8, requires_grad=True)
    # the ReLU's output is what it and the next layer keep: one storage of 4 x 8 floats
    assert kept_for_backward(model, x) == 4 * 4 * 8
