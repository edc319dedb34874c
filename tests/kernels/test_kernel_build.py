"""Compiling on first use: two processes at once, no compiler, a damaged cache, forks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgetune import kernels
from edgetune.kernels import build

SOURCE = Path(kernels.__file__).parents[2]
SCRIPT = """
import json, torch
from edgetune import kernels
from edgetune.kernels import build, fallback
build.FLAGS = tuple(flag.replace('-O3', '-O0') for flag in build.FLAGS)  # what is tested isn't its speed
x = torch.arange(160, dtype=torch.float32).reshape(1, 2, 8, 10)
right = torch.equal(kernels.patch_mean(x, 2, 2), fallback.patch_mean(x, 2, 2))
print(json.dumps({**kernels.status().model_dump(), "right": right}))
"""
WITHOUT_ZIG = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == 'ziglang' else find(name, *rest)
"""
needs_compiler = pytest.mark.skipif(not build.compilers(), reason="no C compiler on this machine")


def _start(cache: Path, script: str = SCRIPT, **changes: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1",
                   "EDGETUNE_CACHE": str(cache), **changes}
    environment.pop("EDGETUNE_NATIVE", None) if "EDGETUNE_NATIVE" not in changes else None
    return subprocess.Popen([sys.executable, "-c", script], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def _answer(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@needs_compiler
def test_two_processes_build_at_once_then_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    answers = [_answer(process) for process in [_start(tmp_path), _start(tmp_path)]]
    assert all(answer["native"] and answer["right"] for answer in answers), answers
    libraries = list(tmp_path.glob("*.so"))
    assert len(libraries) == 1 and str(libraries[0]) == answers[0]["path"]
    assert not list(tmp_path.glob(".kernels-*")), "a half-written file was left behind"
    libraries[0].unlink()
    libraries[0].write_bytes(b"not a library")
    assert _answer(_start(tmp_path))["native"]


def test_without_a_compiler_the_fallback_runs_and_says_so(tmp_path: Path) -> None:
    answer = _answer(_start(tmp_path, WITHOUT_ZIG + SCRIPT, PATH="", CC=""))
    assert answer["right"] and not answer["native"]
    assert "no C compiler was found" in str(answer["reason"])


def test_a_compiler_that_fails_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "cc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho 'cc: out of order' >&2\nexit 1\n")
    broken.chmod(0o755)
    answer = _answer(_start(tmp_path / "cache", WITHOUT_ZIG + SCRIPT, PATH=str(broken.parent), CC=""))
    assert answer["right"] and not answer["native"] and "out of order" in str(answer["reason"])


def test_native_code_can_be_turned_off(tmp_path: Path) -> None:
    answer = _answer(_start(tmp_path, EDGETUNE_NATIVE="0"))
    assert answer["right"] and not answer["native"] and "EDGETUNE_NATIVE" in str(answer["reason"])


def test_an_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("a file where the folder should be")
    answer = _answer(_start(occupied))
    assert answer["right"] and not answer["native"] and "file" in str(answer["reason"])


def test_the_pool_survives_a_fork() -> None:
    script = """
import os, torch
from edgetune import kernels
torch.set_num_threads(2)
x = torch.randn(4, 64, 56, 56)
wanted = kernels.patch_mean(x, 2, 2)
child = os.fork()
if child == 0:
    found = kernels.patch_mean(x, 2, 2)
    torch.set_num_threads(1)  # torch's own operators hang on OpenMP threads that have stayed in the parent
    os._exit(0 if torch.equal(found, wanted) else 1)
assert torch.equal(kernels.patch_mean(x, 2, 2), wanted)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print('{}')
"""
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    _answer(_start(build.cache_folder(), script))


@needs_compiler
def test_zig_builds_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang")
    quick = [flag.replace("-O3", "-O0") for flag in build.FLAGS]
    monkeypatch.setattr(build, "FLAGS", (*quick, "-fno-sanitize=all"))
    monkeypatch.setattr(build, "UNITS", ("threads.c", "float32.c"))
    target = tmp_path / "kernels.so"
    build._compile((sys.executable, "-m", "ziglang", "cc"), target)
    assert build._open(target)


def test_sources_have_no_warnings() -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("neither gcc nor clang is here")
    flags = [flag for flag in build.FLAGS if flag not in ("-w", "-O3")]
    flags += ["-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    units = [build.SOURCES / unit for unit in build.UNITS]
    for extra in (["-DET_PLAIN"], ["-march=native"] if build.platform.machine() == "x86_64" else []):
        made = subprocess.run([compiler, *flags, *extra, *units], capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
