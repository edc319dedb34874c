"""The NEON code, cross-compiled and run under user-mode emulation, against the plain C code built the same way."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgetune.kernels import build

DRIVER = Path(__file__).with_name("neon_check.c")


def _cross_compiler() -> list[str] | None:
    if shutil.which("aarch64-linux-gnu-gcc"):
        return ["aarch64-linux-gnu-gcc", "-static"]
    if importlib.util.find_spec("ziglang") is not None:
        zig = [sys.executable, "-m", "ziglang", "cc"]
        return [*zig, "-target", "aarch64-linux-musl", "-static", "-fno-sanitize=all"]
    return None


def _answer(command: list[str], runner: list[str], program: Path, *flags: str) -> list[str]:
    sources = [str(build.SOURCES / unit) for unit in build.UNITS]
    kept = [flag for flag in build.FLAGS if flag not in ("-fPIC", "-shared", "-O3")]
    subprocess.run([*command, *kept, *flags, "-o", str(program), str(DRIVER), *sources, "-lm"], check=True)
    ran = subprocess.run([*runner, str(program)], check=True, capture_output=True, text=True)
    return ran.stdout.splitlines()


def test_neon_equals_plain_c(tmp_path: Path) -> None:
    command, emulator = _cross_compiler(), shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if command is None or emulator is None:
        pytest.skip("needs a compiler for aarch64 (gcc or the ziglang package) and qemu-aarch64")
    neon = _answer(command, [emulator], tmp_path / "neon")
    plain = _answer(command, [emulator], tmp_path / "plain", "-DET_PLAIN")
    assert len(neon) > 1000 and neon == plain


def test_this_cpu_equals_plain_c(tmp_path: Path) -> None:
    compiler = next(iter(build.compilers()), None)
    if compiler is None or build.platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("needs a C compiler and an x86 or ARM processor")
    plain = _answer([*compiler], [], tmp_path / "plain", "-DET_PLAIN")
    assert len(plain) > 1000
    for flags in (["-march=native"], ["-mavx2", "-mfma"]) if build.platform.machine() == "x86_64" else ([],):
        if "-mavx2" in flags and "avx2" not in build.cpu()[1]:
            continue
        assert _answer([*compiler], [], tmp_path / "fast", *flags) == plain, flags
