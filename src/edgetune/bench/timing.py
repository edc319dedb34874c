"""Timing method and baseline side by side, and saying on what they ran.

On a shared machine a single time means little; what is compared here runs in turns, one after the other in every
round, so that whatever else the machine does falls on all of them alike. The ratio of medians is the result.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from edgetune.kernels import build
from edgetune.record import atomic_write

Row = dict[str, Any]
Result = dict[str, Any]
"""`machine` (str), `versions` (name -> version), `git` (str) and `rows` (list of Row)."""


def interleave(functions: Mapping[str, Callable[[], object]], *, rounds: int = 15, turn_ms: float = 0.0,
               device: str = "cpu") -> dict[str, float]:
    """Median milliseconds of one call of each function, all taking turns in every round.

    A turn is one call that is not timed, which brings back the caches that the others have emptied, and then at
    least one timed call, repeated for about `turn_ms`. The order of the turns is reversed from round to round.
    """
    repeats = {name: _repeats(function, turn_ms, device) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    for _ in range(rounds):
        for name in order:
            functions[name]()
            times[name].append(_time(functions[name], repeats[name], device))
        order.reverse()
    return {name: statistics.median(found) for name, found in times.items()}


def _time(function: Callable[[], object], repeats: int, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _wait(device)
    return (time.perf_counter() - start) * 1e3 / repeats


def _repeats(function: Callable[[], object], turn_ms: float, device: str) -> int:
    """How many calls fill a turn; also the warm-up."""
    function()
    once = min(_time(function, 1, device) for _ in range(3))
    return max(1, min(round(turn_ms / max(once, 1e-3)), 1000))


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch and the kernels use `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(device: str = "cpu") -> str:
    """What the suite ran on, in words."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {platform.system()} {platform.machine()}"
    name, flags = build.cpu()
    vectors = next((label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("asimd", "NEON"))
                    if flag in flags), "")
    kernels = "native kernels" if build.status().native else "no native kernels"
    return ", ".join(part for part in (name, vectors, f"{os.cpu_count()} cores", kernels) if part)


def versions() -> dict[str, str]:
    """The versions that the numbers depend on."""
    return {"edgetune": _version("edgetune"), "torch": str(torch.__version__), "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "source"


def git_hash() -> str:
    """The commit of the sources, or `unknown` outside a checkout; `+` marks changes that are not committed."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "--", str(folder.parent)], cwd=folder,
                                 capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def load_average() -> float:
    """Processes that wanted the CPU in the last minute, 0 where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def result(rows: list[Row], device: str = "cpu") -> Result:
    """The one object a suite gives: where, with what, and the rows."""
    return {"machine": machine(device), "versions": versions(), "git": git_hash(), "rows": rows}


def save(path: str | Path, suite: str, found: Result) -> None:
    """Write the rows as JSON lines, each complete in itself; rows of other machines in the file stay.

    Raises RunError when the file cannot be written.
    """
    target = Path(path)
    stamp = {"suite": suite, **{name: found[name] for name in ("machine", "git", "versions")}}
    others = [row for row in read(target) if row["machine"] != found["machine"]] if target.exists() else []
    lines = [json.dumps(row) + "\n" for row in (*others, *({**stamp, **row} for row in found["rows"]))]
    atomic_write(target, "".join(lines).encode())


def read(path: str | Path) -> list[Row]:
    """The rows of a file that `save` wrote."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def medians(rows: list[Row], fields: tuple[str, ...], by: tuple[str, ...]) -> list[Row]:
    """One row a group of equal `by` values, with the medians of `fields` and the number of `cases`."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
    return [{**dict(zip(by, key, strict=True)), "cases": len(group),
             **{name: statistics.median(row[name] for row in group if row.get(name) is not None)
                for name in fields if any(row.get(name) is not None for row in group)}}
            for key, group in groups.items()]
