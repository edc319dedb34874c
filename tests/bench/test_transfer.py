"""The transfer benchmark: the published operator's faults, folds and views, rows from cells, a small grid resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from edgetune.bench import transfer
from edgetune.bench.cases import Bench
from edgetune.bench.cells import CellStore, mean_interval, pack_bits
from edgetune.bench.photos import Photos, behind, inner_split, stratified_folds
from edgetune.bench.published import PublishedFilter
from edgetune.contract import REGISTRY
from edgetune.data import Augment, Preprocess
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.overlap import ConvGeometry


def layer(size: int, stride: int, groups: int = 1) -> ConvGeometry:
    return ConvGeometry(
        in_channels=4,
        out_channels=4,
        groups=groups,
        in_hw=(size, size),
        kernel=(3, 3),
        stride=(stride, stride),
        dilation=(1, 1),
        pads=(1, 1, 1, 1),
    )


def over_scaling(geometry: ConvGeometry, patch_px: int) -> tuple[float, float]:
    """Published over exact, sums of both gradients, on constant maps and weights."""
    x = torch.ones(1, 4, *geometry.in_hw, dtype=torch.float64)
    gy = torch.ones(1, 4, *geometry.out_hw, dtype=torch.float64)
    weight = torch.ones(4, 4 // geometry.groups, 3, 3, dtype=torch.float64)
    sums = []
    for method in (PublishedFilter(patch_px=patch_px), Exact()):
        g = method.receive(gy, geometry)
        gx = method.grad_input(g, weight, geometry)
        gw = method.grad_weight(method.save(x, geometry), g, geometry)
        assert gx.shape == x.shape and gw.shape == weight.shape
        sums.append((float(gx.sum()), float(gw.sum())))
    (gx_published, gw_published), (gx_exact, gw_exact) = sums
    return gx_published / gx_exact, gw_published / gw_exact


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("size", "patch_px"), [(32, 2), (32, 4), (28, 2), (28, 7), (14, 7)])
def test_the_published_operator_is_four_times_too_large_at_stride_two(size: int, patch_px: int, groups: int) -> None:
    for ratio in over_scaling(layer(size, 2, groups), patch_px):
        assert 4.1 < ratio < 4.45  # s**2, and the border taps that count as inside


@pytest.mark.parametrize(("size", "patch_px"), [(32, 2), (28, 4), (14, 7)])
def test_the_published_operator_counts_border_taps_at_stride_one(size: int, patch_px: int) -> None:
    expected = (3 * size / (3 * size - 2)) ** 2  # of 3n taps an axis, two fall outside
    assert over_scaling(layer(size, 1), patch_px) == pytest.approx((expected, expected))


def test_the_published_operator_is_ours_where_its_faults_do_not_show() -> None:
    geometry = layer(8, 1).model_copy(update={"kernel": (1, 1), "pads": (0, 0, 0, 0)})
    x, gy = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    weight = torch.randn(4, 4, 1, 1)
    found = []
    for method in (PublishedFilter(patch_px=2), GradientFilter(patch_px=2)):
        g = method.receive(gy, geometry)
        gw = method.grad_weight(method.save(x, geometry), g, geometry)
        found.append((method.grad_input(g, weight, geometry), gw))
    torch.testing.assert_close(found[0], found[1])


def test_the_published_operator_cannot_be_asked_for_by_name() -> None:
    assert PublishedFilter not in REGISTRY.values()


def test_folds_are_disjoint_complete_and_stratified() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[torch.randperm(100)]
    folds = stratified_folds(labels, 5)
    assert sorted(i for _, test in folds for i in test) == list(range(100))
    for train, test in folds:
        assert sorted([*train, *test]) == list(range(100))
        assert labels[test].bincount().tolist() == [10, 6, 4]


def photos() -> Photos:
    labels = torch.arange(20) % 2
    pixels = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8)
    preprocess = Preprocess(size=(16, 16))
    return Photos("drawn", pixels, labels, stratified_folds(labels, 2), preprocess, Augment(crop_scale=0.5))


def test_the_rate_is_chosen_on_no_photo_of_the_first_fold() -> None:
    drawn = photos()
    train, held_out = inner_split(drawn)
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(drawn.splits[0][0])


def test_maps_are_those_of_the_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    drawn, frozen = photos(), nn.Conv2d(3, 2, 3)
    maps = behind(drawn, frozen, 2, "conv")
    with torch.no_grad():
        for epoch in (None, 0, 1):
            torch.testing.assert_close(maps.seen([3, 1], epoch), frozen(drawn.seen([3, 1], epoch)))
    assert not torch.equal(drawn.seen([3], 0), drawn.seen([3], 1))
    again = behind(drawn, nn.Conv2d(3, 2, 3), 2, "conv")  # not run once more: the maps are there
    assert torch.equal(again.maps, maps.maps)


def cell(method: str, run: int, correct: list[bool], **more: object) -> dict[str, object]:
    case = transfer.LAST4
    return {
        **{"suite": "transfer-cell", "case": case.name, "size": case.size, "epochs": case.epochs},
        **{"method": method, "patch_px": None, "taps": None, "quick": False, "run": run, "network": case.start.network},
        **{"data": "flowers5", "batch": 32, "rate": 0.02, "kept_bytes": 8, "machine": "m", "git": "g"},
        **{"versions": {}, "correct": pack_bits(torch.tensor(correct)), "tested": len(correct)},
        **{"test_set": f"fold{run}", "accuracy": 100 * sum(correct) / len(correct), **more},
    }


def test_rows_compare_with_plain_on_the_same_photos(tmp_path: Path) -> None:
    store = CellStore(tmp_path / "transfer.jsonl")
    store.append(cell("plain", 0, [True, True, False, True], kept_bytes=64))
    store.append(cell("plain", 1, [True, False, False, True]))
    store.append(cell("pooled chain", 0, [True, True, True, True], patch_px=2, taps="mean"))
    store.append(cell("pooled chain", 1, [True, False, False, False], patch_px=2, taps="mean"))
    store.append(cell("pooled chain", 2, [False] * 4, patch_px=2, taps="mean", epochs=99))
    plain, ours = transfer.summarise(store.path)
    assert (plain["accuracy_mean"], plain["seeds"]) == (62.5, 2)
    assert "accuracy_difference" not in plain
    assert (ours["accuracy_mean"], ours["accuracy_difference"], ours["seeds"]) == (62.5, 0.0, 2)
    expected = mean_interval([0, 0, 100, 0, 0, 0, 0, -100])
    assert (ours["difference_low"], ours["difference_high"]) == pytest.approx((expected.low, expected.high))
    by_run = mean_interval([25, -25])
    assert ours["difference_low_by_run"] == pytest.approx(by_run.low)
    assert (ours["kept_bytes"], ours["kept_bytes_baseline"]) == (8, 64)


def test_every_row_of_the_grid_has_a_name_of_its_own() -> None:
    rows = [(case.name, *arm.identity.values()) for case, arm in transfer.ROWS]
    assert len(rows) == len(set(rows))
    assert all(transfer.GRID.plain(case).identity == transfer.PLAIN.identity for case in transfer.GRID.cases)


def test_a_quick_grid_is_run_once_and_resumed(
    tmp_path: Path, shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shared("flowers5_224").parent
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    small = Bench(transfer.HEAD, str(data), quick=True)
    assert len(small.photos().labels) == 400
    out = tmp_path / "transfer.jsonl"
    options = transfer.Options(data=str(data), out=str(out), quick=True, cases=("head only",))
    found = transfer.run(options)
    (row,) = found["rows"]
    assert row["accuracy_mean"] > 60 and row["seeds"] == 2
    cells = [line for line in CellStore(out).lines() if line["suite"] != "transfer"]
    shutil.copy(out, tmp_path / "kept.jsonl")
    assert transfer.run(options)["rows"] == found["rows"]
    assert [line for line in CellStore(out).lines() if line["suite"] != "transfer"] == cells
    assert json.loads(out.read_text().splitlines()[-1])["suite"] == "transfer"
