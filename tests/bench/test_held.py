"""The suite of held values: rows are whole, fewer bits or stretches keep fewer bytes; times are never judged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgetune.bench.held import HeldOptions, run

DATA = os.environ.get("EDGETUNE_DATA", "../shared/data")


@pytest.mark.skipif(not (Path(DATA) / "flowers5_224").exists(), reason="no photos: set EDGETUNE_DATA")
def test_rows_say_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # peaks are planned for maps in this order; which one is faster is the machine's
    monkeypatch.setattr("edgetune.bench.held.fastest", lambda ms, what: "contiguous")
    methods = ("exact", "2-bit kept", "COMET", "sqrt(n) stretches", "planned stretches")
    rows = run(HeldOptions(data=DATA, models=("mobilenet_v2",), methods=methods, size_px=32, batch=4, threads=1,
                           rounds=1))["rows"]  # fmt: skip
    kept, peaks = ({row["method"]: row[field] for row in rows} for field in ("kept_bytes", "peak_bytes"))
    assert tuple(kept) == methods
    assert max(kept["2-bit kept"], kept["COMET"]) < kept["exact"] / 4 < rows[0]["kept_bytes_baseline"] / 4
    assert kept["sqrt(n) stretches"] < kept["exact"]
    assert peaks["planned stretches"] <= 1.03 * min(peaks["sqrt(n) stretches"], peaks["exact"])
    assert all(row["baseline_ms"] > 0 and row["peak_bytes"] > 0 for row in rows)
