"""A search, guided by coverage, for bytes that the native decoder doesn't survive, under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edgetune.kernels import build

HARNESS = Path(__file__).with_name("fuzz_bounded.c")
SANITIZED = ["-std=c11", "-O1", "-g", "-w", "-pthread", "-DET_FUZZ", "-fsanitize=address,undefined",
             "-fno-sanitize-recover=all"]  # fmt: skip
PLAIN = ["-DET_PLAIN"]
NATIVE = ["-march=native"] if build.platform.machine() == "x86_64" else []
VARIANTS = pytest.mark.parametrize("flags", [PLAIN, NATIVE], ids=["plain", "native"])


def _run(command: list[str], seconds: int = 280) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds,
                          env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})  # fmt: skip


def _built(folder: Path, flags: list[str], sources: Path = build.SOURCES) -> Path:
    """The search by gcc, where it can; skips the test where it can't."""
    gcc, program, codec = shutil.which("gcc"), folder / "fuzz", folder / "codec.o"
    if gcc is None:
        pytest.skip("gcc is not here, whose -fsanitize-coverage=trace-pc guides the search")
    for command in (["-fsanitize-coverage=trace-pc", "-c", "-o", str(codec), str(sources / "bounded.c")],
                    ["-o", str(program), str(HARNESS), str(codec), str(build.SOURCES / "threads.c")]):
        made = _run([gcc, *SANITIZED, *flags, *command])
        if made.returncode:
            pytest.skip(f"gcc can't build with sanitizers: {made.stderr.strip()[-300:]}")
    return program


@VARIANTS
def test_the_decoder_survives_every_input(flags: list[str], tmp_path: Path) -> None:
    ran = _run([str(_built(tmp_path, flags)), "4", "1"])
    assert ran.returncode == 0, ran.stderr[-3000:]
    runs, sown, kept, edges = map(int, ran.stdout.split())
    assert runs > 200 and kept > 1.2 * sown and edges > 100, ran.stdout


def test_a_check_that_is_missing_is_found(tmp_path: Path) -> None:
    """Without the check that a mask ends within its block, the same search stops at a report."""
    sources = shutil.copytree(build.SOURCES, tmp_path / "native")
    decoder = sources / "bounded_decode.c"
    check = "if (at >= m) return 0;"
    assert decoder.read_text().count(check) == 1
    decoder.write_text(decoder.read_text().replace(check, ""))
    ran = _run([str(_built(tmp_path, PLAIN, sources)), "30", "1"])
    assert ran.returncode != 0 and "bounded_decode.c" in ran.stderr, ran.stdout


def test_libfuzzer_finds_nothing(tmp_path: Path) -> None:
    clang, program = shutil.which("clang"), tmp_path / "fuzz"
    if clang is None:
        pytest.skip("clang is not here, which has libFuzzer")
    sources = [str(HARNESS), str(build.SOURCES / "bounded.c"), str(build.SOURCES / "threads.c")]
    flags = [*SANITIZED, *NATIVE, "-DET_LIBFUZZER", "-fsanitize=fuzzer", "-o", str(program)]
    made = _run([clang, *flags, *sources])
    if made.returncode:
        pytest.skip(f"clang can't build with libFuzzer: {made.stderr.strip()[-300:]}")
    ran = _run([str(program), "-max_total_time=5", "-seed=1", "-max_len=8192", "-print_final_stats=1"])
    assert ran.returncode == 0, ran.stderr[-3000:]
