"""What the doctor finds: read from files of a made-up machine, and consistent on this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.doctor import Kernels, _advice, examine, memory, usable_cores
from edgetune.kernels import NAMES

MEMINFO = "MemTotal:       16000 kB\nMemFree:  10 kB\nMemAvailable:    9000 kB\n"


@pytest.mark.parametrize(
    ("meminfo", "limit", "found"),
    [
        (MEMINFO, None, (16_384_000, 9_216_000)),
        (MEMINFO, "max\n", (16_384_000, 9_216_000)),
        (MEMINFO, "8192000\n", (8_192_000, 8_192_000)),
        (MEMINFO, "9223372036854771712\n", (16_384_000, 9_216_000)),
        ("MemTotal: much\n", None, (None, None)),
        (None, None, (None, None)),
    ],
)
def test_memory_is_the_smaller_of_machine_and_container(
    meminfo: str | None, limit: str | None, found: tuple[int | None, int | None], tmp_path: Path
) -> None:
    if meminfo is not None:
        (tmp_path / "meminfo").write_text(meminfo)
    if limit is not None:
        (tmp_path / "limit").write_text(limit)
    assert memory(tmp_path / "meminfo", (tmp_path / "limit",)) == found


def test_this_machine() -> None:
    health = examine()
    assert health.cores == usable_cores() >= 1 and health.threads >= 1
    assert set(health.kernels.ops) == set(NAMES)
    assert health.kernels.native == ("native" in health.kernels.ops.values())
    assert health.packages["torch"] is not None
    assert type(health).model_validate_json(health.model_dump_json()) == health


def test_advice_names_what_would_help() -> None:
    native = Kernels(native=True, reason="compiled", compiler="cc", library="k.so", ops={})
    torch_only = native.model_copy(update={"native": False, "reason": "no C compiler was found"})
    assert _advice(native, 2, 2) == []
    assert "no C compiler was found" in _advice(torch_only, 2, 2)[0]
    assert _advice(native, 2, 8) == ["torch uses 8 threads on 2 cores: set OMP_NUM_THREADS=2."]
