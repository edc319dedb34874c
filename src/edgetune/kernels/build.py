"""Compiles native/*.c for this very CPU on first use, into the user's cache folder.

The library's name carries a digest of sources, flags, compiler and CPU, so that a cache folder shared between
machines or versions never mixes them. A lock file and an atomic rename let any number of processes start at
once. Where no compiler is found, or it fails, `status()` says why and the plain-torch fallbacks run.

Environment: EDGETUNE_NATIVE=0 turns native code off; EDGETUNE_CACHE names the folder (default: edgetune in
XDG_CACHE_HOME or ~/.cache); CC names the compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from edgetune.record import Record

SOURCES = Path(__file__).parent / "native"
UNITS = ("threads.c", "float32.c", "bfloat16.c", "bounded.c", "binary.c", "adder.c")
# NaN and infinity must pass through every kernel: nothing here may assume them away.
FLAGS = ("-std=c11", "-O3", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-ffp-contract=fast", "-w")
COMPILE_SECONDS = 300
OPS = ("patch_mean", "patch_spread", "mask_pack", "mask_apply", "mask_count", "bits_count",
       "masked_patch_mean", "norm_backward", "grid_products", "group_pack", "group_unpack", "max_pool",
       "max_pool_backward", "bounded_sizes", "bounded_encode", "bounded_decode", "sign_pack", "sign_unpack",
       "arrange_filters", "binary_conv", "binary_conv_clip", "binary_conv_sign", "bit_weight_conv", "affine_clip",
       "adder_conv", "adder_conv_input_gradient", "adder_filters", "adder_conv_u8", "adder_conv_steps")


class Status(Record):
    """What `edgetune doctor` shows of the kernels: native or not, by which compiler, and why not."""

    native: bool
    reason: str
    compiler: str | None = None
    path: str | None = None
    cpu: str = ""
    cpu_flags: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()


class _BuildError(Exception):
    """Why there is no native library."""


@cache
def cpu() -> tuple[str, tuple[str, ...]]:
    """Model name and feature flags of this machine's CPU, as far as the system tells."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".strip(), ()
    fields = dict(reversed([(key.strip(), value.strip()) for key, _, value in
                            (line.partition(":") for line in text.splitlines())]))
    part = " ".join(fields.get(key, "") for key in ("CPU implementer", "CPU part"))
    model = fields.get("model name") or part
    flags = fields.get("flags") or fields.get("Features") or ""
    return f"{platform.machine()} {model}".strip(), tuple(sorted(flags.split()))


def compilers() -> list[tuple[str, ...]]:
    """Compiler commands worth trying, best first: CC, cc, clang, gcc, and zig from the ziglang package."""
    found: list[tuple[str, ...]] = []
    asked = shlex.split(os.environ.get("CC", ""))
    for command in (asked, ["cc"], ["clang"], ["gcc"], ["zig", "cc"]):
        program = shutil.which(command[0]) if command else None
        if program:
            found.append((program, *command[1:]))
    if importlib.util.find_spec("ziglang") is not None:
        found.append((sys.executable, "-m", "ziglang", "cc"))
    return found


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    named = os.environ.get("EDGETUNE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetune"


def _digest(compiler: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr((FLAGS, compiler, cpu(), sys.platform)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".c", ".h"):
            digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:20]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; where the system has no file locks, the atomic rename alone must do."""
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        except (ImportError, OSError):
            pass
        yield


def _compile(compiler: tuple[str, ...], target: Path) -> None:
    """Compile into `target`, for this CPU where the compiler can. Raises _BuildError with its last words."""
    tune = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=".kernels-", suffix=".so")
    os.close(handle)
    words = ""
    try:
        for extra in ((tune,), ()):
            command = [*compiler, *FLAGS, *extra, "-o", temporary, *(str(SOURCES / unit) for unit in UNITS), "-lm"]
            made = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS,
                                  check=False)
            if made.returncode == 0:
                os.replace(temporary, target)
                return
            words = (made.stderr.strip().splitlines() or [f"exit status {made.returncode}"])[-1]
        raise _BuildError(f"'{' '.join(compiler)}' failed: {words}")
    except subprocess.TimeoutExpired as failure:
        raise _BuildError(f"'{' '.join(compiler)}' took longer than {COMPILE_SECONDS} s") from failure
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.et_patch_mean_f32  # noqa: B018  a truncated or foreign file has no such symbol
    return library


def _build_with(compiler: tuple[str, ...]) -> tuple[ctypes.CDLL, Path]:
    """The library made by this compiler: from the cache, or compiled now."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels-{_digest(compiler)}.so"
    if path.exists():
        try:
            return _open(path), path
        except (OSError, AttributeError):
            pass  # damaged, by a full disk say: made anew below
    with _locked(folder / f"{path.name}.lock"):
        try:
            return _open(path), path  # another process made it while we waited
        except (OSError, AttributeError):
            path.unlink(missing_ok=True)
        _compile(compiler, path)
        return _open(path), path


def _share_threads(library: ctypes.CDLL) -> None:
    """Let the kernels run on torch's own OpenMP threads, where it has GNU's: two pools would fight for the cores."""
    with suppress(OSError, AttributeError):
        path = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
        if path is not None and str(path) in Path("/proc/self/maps").read_text():
            library.et_use_team(ctypes.CDLL(str(path)).GOMP_parallel)


_guard = threading.Lock()
_loaded: tuple[ctypes.CDLL | None, Status] | None = None


def _load() -> tuple[ctypes.CDLL | None, Status]:
    model, flags = cpu()
    if os.environ.get("EDGETUNE_NATIVE", "") == "0":
        return None, Status(native=False, reason="EDGETUNE_NATIVE=0 is set", cpu=model, cpu_flags=flags)
    reasons = []
    for compiler in compilers():
        try:
            library, path = _build_with(compiler)
        except (_BuildError, OSError, AttributeError) as failure:
            reasons.append(str(failure))
            continue
        _share_threads(library)
        return library, Status(native=True, reason="compiled for this CPU", compiler=" ".join(compiler),
                               path=str(path), cpu=model, cpu_flags=flags, ops=OPS)
    reason = "; ".join(reasons) or ("no C compiler was found: install gcc or clang, or `pip install "
                                    "ziglang`; the slower torch versions run meanwhile")
    return None, Status(native=False, reason=reason, cpu=model, cpu_flags=flags)


def _once() -> tuple[ctypes.CDLL | None, Status]:
    global _loaded
    if _loaded is None:
        with _guard:
            if _loaded is None:
                _loaded = _load()
    return _loaded


def library() -> ctypes.CDLL | None:
    """The native library, compiled now if the cache doesn't hold it; None where there is none."""
    return _once()[0]


def status() -> Status:
    """How the kernels run here, compiling them first where they aren't yet."""
    return _once()[1]
