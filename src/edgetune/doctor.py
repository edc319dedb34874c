"""What edgetune finds on this machine: versions, processor, memory, threads, and which kernels run as native code."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from edgetune.kernels import NAMES, status
from edgetune.record import Record

PACKAGES = (
    "edgetune",
    "torch",
    "numpy",
    "pydantic",
    "safetensors",
    "pillow",
    "scikit-learn",
    "kornia",
    "matplotlib",
    "timm",
    "torchvision",
)
TELLING_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "neon",
    "asimd",
    "asimdhp",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
)
"""Processor features that decide how fast training can be; the system lists hundreds more."""


class Kernels(Record):
    """Whether the kernels run as native code here: by which compiler, from which file, and why not where they don't."""

    native: bool
    reason: str
    compiler: str | None
    library: str | None
    ops: dict[str, str]


class Health(Record):
    """What `edgetune doctor` tells. Memory is in bytes; `advice` says what would help, a sentence each."""

    python: str
    system: str
    packages: dict[str, str | None]
    cpu: str
    cpu_features: tuple[str, ...]
    cores: int
    threads: int
    memory_bytes: int | None
    memory_available_bytes: int | None
    cuda: tuple[str, ...]
    kernels: Kernels
    advice: tuple[str, ...]


def examine() -> Health:
    """Look at this machine; kernels are compiled first where they aren't yet."""
    found, cores, threads = status(), usable_cores(), torch.get_num_threads()
    kernels = Kernels(
        native=found.native,
        reason=found.reason,
        compiler=found.compiler,
        library=found.path,
        ops={name: "native" if name in found.ops else "torch" for name in NAMES},
    )
    total, available = memory()
    return Health(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages={name: _version(name) for name in PACKAGES},
        cpu=found.cpu,
        cpu_features=tuple(flag for flag in TELLING_FLAGS if flag in found.cpu_flags),
        cores=cores,
        threads=threads,
        memory_bytes=total,
        memory_available_bytes=available,
        cuda=_cuda(),
        kernels=kernels,
        advice=tuple(_advice(kernels, cores, threads)),
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux tells
        return os.cpu_count() or 1


def memory(
    proc: Path = Path("/proc/meminfo"),
    limits: tuple[Path, ...] = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")),
) -> tuple[int | None, int | None]:
    """Bytes of memory that this process may use, and of those now free; None where the system does not tell.

    A container's limit counts where it is lower than the machine's.
    """
    try:
        fields = dict(line.split(":", 1) for line in proc.read_text().splitlines() if ":" in line)
        total, free = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError, IndexError):
        return None, None
    for path in limits:
        try:
            total = min(total, int(path.read_text()))
        except (OSError, ValueError):  # no container, or "max"
            continue
    return total, min(free, total)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _advice(kernels: Kernels, cores: int, threads: int) -> list[str]:
    said = []
    if not kernels.native:
        said.append(f"Kernels run as plain torch, which is slower ({kernels.reason}).")
    if threads > cores:
        said.append(f"torch uses {threads} threads on {cores} cores: set OMP_NUM_THREADS={cores}.")
    return said
