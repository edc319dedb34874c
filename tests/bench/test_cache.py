"""The suite of cached epochs: well-formed rows, everything found from the second epoch on; times are never judged."""

from __future__ import annotations

import pytest

from edgetune.bench import cache, timing
from edgetune.bench.cache import CacheOptions

TINY = CacheOptions(models=("resnet8",), sizes_px=(32,), depth=2, patch_px=(2,), codecs=("float32", "int8"),
                    pictures=4, batch=2, rounds=1)  # fmt: skip


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_cache_gives_a_row_for_every_method_and_codec(keep: str) -> None:
    seen: list[timing.Row] = []
    found = cache.run(TINY.model_copy(update={"keep": keep}), seen.append)
    assert found["rows"] == seen
    cells = {(row["case"], row["method"], row["patch_px"], row["codec"]) for row in seen}
    assert cells == {("resnet8@32 last 2", *method, codec) for method in (("exact", None), ("pooled_chain", 2))
                     for codec in ("float32", "int8")}  # fmt: skip
    for row in seen:
        assert row["speedup"] == pytest.approx(row["baseline_ms"] / row["method_ms"])
        assert row["method_speedup"] == pytest.approx(row["uncached_ms"] / row["method_ms"])
        assert row["hit_rate"] == pytest.approx(2 / 3), "of two calls to warm up and one that is timed, the first fills"
    sizes = {row["codec"]: row["sample_bytes"] for row in seen}
    assert 3 < sizes["float32"] / sizes["int8"] < 4
