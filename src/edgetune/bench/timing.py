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
from typing import Any, Literal, NamedTuple

import torch

from edgetune.kernels import build
from edgetune.record import atomic_write

Clock = Literal["wall", "cpu"]
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}

QUIET = 0.05
"""A round in which others had less of the machine counts as undisturbed."""
PATIENCE = 2
"""How many times the rounds may be repeated to find undisturbed ones."""

Row = dict[str, Any]
Result = dict[str, Any]
"""`machine` (str), `versions` (name -> version), `git` (str) and `rows` (list of Row)."""


class Timed(NamedTuple):
    """Median milliseconds of each function, and the share of the machine that other processes had meanwhile (0-1)."""

    ms: dict[str, float]
    others: float


def interleave(functions: Mapping[str, Callable[[], object]], *, rounds: int = 15, turn_ms: float = 0.0,
               device: str = "cpu", clock: Clock = "wall") -> Timed:
    """Time functions in turns, all of them in every round; the medians of the quietest `rounds` rounds.

    With `turn_ms` a turn is one call that is not timed, which brings back the caches that the others have emptied,
    and then timed calls for about that long; without, it is one timed call. The order of the turns is reversed from
    round to round. While other processes disturb more than QUIET of the machine, up to PATIENCE times as many rounds
    are made. The clock "cpu" counts the time that a core spent on this process, which with one thread is what an idle
    machine would take: the way to measure where others run too.
    """
    now = CLOCKS[clock]
    repeats = {name: _repeats(function, turn_ms, device, now) for name, function in functions.items()}
    order, found = list(functions), list[tuple[float, dict[str, float]]]()
    for _ in range(PATIENCE * rounds):
        watch = _Watch()
        times: dict[str, float] = {}
        for name in order:
            if turn_ms:
                functions[name]()
            times[name] = _time(functions[name], repeats[name], device, now)
        found.append((watch.others(), times))
        order.reverse()
        if sum(others <= QUIET or clock == "cpu" for others, _ in found) >= rounds:
            break
    quietest = sorted(found, key=lambda each: each[0])[:rounds]
    return Timed({name: statistics.median(times[name] for _, times in quietest) for name in functions},
                 round(statistics.mean(others for others, _ in quietest), 3))


class _Watch:
    """How much of the machine other processes have had since it was made, where the system tells (Linux)."""

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float:
        """Share of all cores, 0 to 1."""
        busy, own, elapsed = (now - then for now, then in zip(self._now(), self._start, strict=True))
        cores = os.cpu_count() or 1
        return min(max(busy - own, 0.0) / (elapsed * cores), 1.0) if busy else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: all cores busy, this process, the clock."""
        try:
            user, nice, system, _, _, *interrupts = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
            busy = sum(map(float, (user, nice, system, *interrupts))) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            busy = 0.0
        return busy, time.process_time(), time.perf_counter()


def _time(function: Callable[[], object], repeats: int, device: str, now: Callable[[], float]) -> float:
    _wait(device)
    start = now()
    for _ in range(repeats):
        function()
    _wait(device)
    return (now() - start) * 1e3 / repeats


def _repeats(function: Callable[[], object], turn_ms: float, device: str, now: Callable[[], float]) -> int:
    """How many calls fill a turn; also the warm-up."""
    function()
    once = min(_time(function, 1, device, now) for _ in range(3 if turn_ms else 1))
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


SAME = ("suite", "machine", "case", "method", "patch_px", "taps", "codec", "bound", "batch", "threads", "quick")
"""What two rows have in common when the later one replaces the earlier."""


def save(path: str | Path, suite: str, found: Result) -> None:
    """Write the rows as JSON lines, each complete in itself, in place of older ones of the same case and machine.

    Raises RunError when the file cannot be written.
    """
    target = Path(path)
    stamp = {"suite": suite, **{name: found[name] for name in ("machine", "git", "versions")}}
    rows = [*(read(target) if target.exists() else []), *({**stamp, **row} for row in found["rows"])]
    latest = {tuple(str(row.get(name)) for name in SAME): row for row in rows}
    atomic_write(target, "".join(json.dumps(row) + "\n" for row in latest.values()).encode())


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
