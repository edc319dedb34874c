"""The suites of layers and steps: well-formed rows and right answers; times are never judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edgetune.bench import layers, steps, timing
from edgetune.bench.layers import LayersOptions, slow_backward
from edgetune.bench.steps import StepsOptions
from edgetune.overlap import ConvGeometry

TINY = LayersOptions(shapes=((4, 9, 7), (8, 4, 12)), patch_px=(2, 4), batch=2, threads=1, rounds=1, turn_ms=0)


@pytest.fixture(scope="module")
def measured() -> timing.Result:
    return layers.run(TINY)


def test_layers_gives_a_row_for_every_shape_and_setting(measured: timing.Result) -> None:
    cells = {(row["case"], row["patch_px"], row["taps"]) for row in measured["rows"]}
    assert cells == {(case, r, taps) for case in ("4@9x7", "8@4x12") for r in (2, 4) for taps in ("mean", "grid")}
    for row in measured["rows"]:
        assert {"baseline_ms", "forward_ms", "keep_ms", "method_ms", "grid_ms"} <= set(row)
        assert (row["batch"], row["threads"], row["kernel_size"]) == (2, 1, 3)
        assert row["backward_speedup"] == pytest.approx(row["baseline_ms"] / row["method_ms"])
        assert row["grid_speedup"] == pytest.approx(row["baseline_ms"] / row["grid_ms"])


def test_layers_kernels_agree_with_the_slow_computation(measured: timing.Result) -> None:
    for row in measured["rows"]:
        assert row["error"] < 1e-5


def test_layers_gradients_have_the_direction_and_scale_of_the_exact_ones(measured: timing.Result) -> None:
    for row in measured["rows"]:
        assert row["cosine"] > 0.7
        assert 0.5 < row["scale"] < 2


def test_layers_keep_what_the_grid_needs(measured: timing.Result) -> None:
    row = next(row for row in measured["rows"] if (row["case"], row["patch_px"]) == ("4@9x7", 4))
    assert row["kept_bytes"] == 2 * 4 * 3 * 2 * 4
    assert row["kept_bytes_baseline"] == 2 * 4 * 9 * 7 * 4


def test_slow_backward_at_one_pixel_is_autograd() -> None:
    geometry = ConvGeometry(in_channels=3, out_channels=3, groups=1, in_hw=(6, 5), kernel=(3, 3), stride=(1, 1),
                            dilation=(1, 1), pads=(1, 1, 1, 1))
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    exact = torch.autograd.grad(torch.nn.functional.conv2d(x, weight, padding=1), (x, weight), gy)
    for ours, theirs in zip(slow_backward(x.detach(), weight.detach(), gy, geometry, 1, "grid"), exact, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_steps_gives_a_row_for_every_depth_and_patch() -> None:
    seen: list[timing.Row] = []
    found = steps.run(StepsOptions(models=("resnet8",), sizes_px=(32,), depths=(2, "all"), batch=2, threads=1,
                                   rounds=1), seen.append)
    assert found["rows"] == seen
    assert [(row["case"], row["patch_px"]) for row in seen] == [
        ("resnet8@32 last 2", 2), ("resnet8@32 last 2", 4), ("resnet8@32 all", 2), ("resnet8@32 all", 4)]
    for row in seen:
        assert 0 < row["kept_bytes"] < row["kept_bytes_baseline"]
        assert row["peak_bytes"] > 0 and row["peak_bytes_baseline"] > 0
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["method_ms"])


def test_rows_are_saved_with_where_they_come_from(measured: timing.Result, tmp_path: Path) -> None:
    file = tmp_path / "layers.jsonl"
    other = {"suite": "layers", "machine": "elsewhere", "git": "0", "versions": {}, "case": "kept", "taps": "mean",
             "patch_px": 2}
    file.write_text(json.dumps(other) + "\n")
    timing.save(file, "layers", measured)
    timing.save(file, "layers", measured)
    rows = timing.read(file)
    assert rows[0] == other
    assert len(rows) == 1 + len(measured["rows"])
    assert all(row["suite"] == "layers" and row["git"] and row["versions"]["torch"] for row in rows[1:])
    medians = layers.summarise(str(file))
    assert {(row["taps"], row["patch_px"], row["cases"]) for row in medians if row["machine"] != "elsewhere"} == {
        (taps, r, 2) for taps in ("mean", "grid") for r in (2, 4)}


def test_interleave_takes_turns_and_counts_only_its_own_calls() -> None:
    turns: list[str] = []
    ms, others = timing.interleave({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=2)
    assert set(ms) == {"a", "b"}
    assert min(ms.values()) >= 0
    assert 0 <= others <= 1
    assert turns[4:8] == ["a", "b", "b", "a"]


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with timing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
