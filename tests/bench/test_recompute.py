"""The suite of values made again: rows are whole, and stretches keep fewer bytes; times are never judged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgetune.bench.recompute import RecomputeOptions, run

DATA = os.environ.get("EDGETUNE_DATA", "../shared/data")


@pytest.mark.skipif(not (Path(DATA) / "flowers5_224").exists(), reason="no photos: set EDGETUNE_DATA")
def test_rows_say_what_is_kept_and_made_again() -> None:
    rows = run(RecomputeOptions(data=DATA, models=("mobilenet_v2",), size_px=32, batch=4, threads=1, rounds=1))["rows"]
    exact, textbook, planner = rows
    assert [row["method"] for row in rows] == ["exact", "sqrt(n)", "planner"]
    assert exact["macs_again"] == 0 < min(textbook["macs_again"], planner["macs_again"])
    assert textbook["kept_bytes"] < exact["kept_bytes"] < exact["kept_bytes_baseline"]
    assert planner["peak_bytes"] <= 1.03 * min(textbook["peak_bytes"], exact["peak_bytes"])
    assert all(row["baseline_ms"] > 0 and row["method_ms"] > 0 for row in rows)
