"""The accuracy bench of other arithmetic: each arm trains and is tested, adder networks once for all their rows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgetune.bench import arithmetic
from edgetune.bench.arms import Arm
from edgetune.bench.cases import Bench, Case, pupil
from edgetune.bench.grid import PLAIN
from edgetune.bench.pretrain import Lesson


@pytest.fixture
def bench(shared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    data_folder = shared("cifar10_jpeg.npz").parent
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return small(arithmetic.RESNET20, data_folder)


def small(case: Case, data_folder: Path) -> Bench:
    """A case whose network has been taught nothing."""
    start = pupil(Lesson(network=case.start.network, size=32, limit=50, cycles=()), arithmetic.cifar(100))
    return Bench(replace(case, start=start, epochs=1), str(data_folder), quick=True)


def arms(case: Case) -> list[Arm]:
    return [arm for other, arm in arithmetic.GRID.rows if other == case]


def cell(bench: Bench, arm: Any) -> dict[str, Any]:
    train, test = bench.photos().splits[0]
    return arithmetic.study(bench, arm, (train[:32], test[:40]), arm.rates[0] if arm.rates else 0.02, 0)


def test_rows_are_all_methods_beside_the_float_network() -> None:
    names = [arm.method for arm in arms(arithmetic.VGG_SMALL)]
    assert names == [PLAIN, "xnor", "ir net", "dir net", "dir net, distilled", "xnor, binary weights", "addernet",
                     *(f"quantized adder, {bits} bits" for bits in (8, 6, 5, 4))]


@pytest.mark.parametrize("name", [PLAIN, "xnor", "dir net, distilled", "dir net, aligned"])
def test_an_arm_trains_and_is_tested(bench: Bench, name: str) -> None:
    arm = next(arm for arm in arms(arithmetic.RESNET20) if arm.method == name)
    found = cell(bench, arm)
    assert found["tested"] == 40 and 0 <= found["accuracy"] <= 100
    assert len(found["curve"]) == 1 and found["curve"][0]["loss"] > 0
    assert found["kept_bytes"] > 0
    assert ("packed_accuracy" in found) is (name != PLAIN)
    if name != PLAIN:
        assert found["packed_other"] == 0 and found["packed_apart"] < 1e-4


def test_a_network_without_blocks_has_no_maps_to_align() -> None:
    resnet20, vgg_small = ([arm.method for arm in arms(case)] for case in arithmetic.GRID.cases)
    assert resnet20 == [*vgg_small, "dir net, aligned"]


def test_an_adder_network_is_trained_once_for_all_its_rows(bench: Bench, tmp_path: Path) -> None:
    adder, *quantized = [arm for arm in arms(arithmetic.RESNET20) if isinstance(arm, arithmetic.Adder)]
    first = cell(bench, adder)
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("edgetune-adder-*.safetensors")}
    assert len(files) == 1
    found = cell(bench, quantized[0])
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert found["tested"] == first["tested"] == 40
    assert found["packed_other"] == 0 and "packed_other" not in first
