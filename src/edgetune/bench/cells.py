"""Cells of an accuracy grid: each is stored once it is finished, and never run again; statistics over them.

A results file holds one JSON object a line. Several processes may work through one grid: a cell is claimed by
a file lock, which a killed process leaves free.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgetune.record import atomic_write

Line = dict[str, Any]


def cell_key(identity: Mapping[str, Any]) -> str:
    """A short name of what a cell is: equal for equal identities, whatever the order of their entries."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


class CellStore:
    """The lines of one results file; safe against kills and against other processes on the same file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        digest = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:16]
        self._locks = Path(tempfile.gettempdir()) / f"edgetune-cells-{digest}"

    def lines(self) -> list[Line]:
        """Every whole line; a last one cut short by a kill is left out."""
        if not self.path.exists():
            return []
        return [json.loads(text) for text in self.path.read_text().splitlines(keepends=True) if text.endswith("\n")]

    def done(self, key: str) -> Line | None:
        """The line of a finished cell, or None."""
        return next((line for line in self.lines() if line.get("key") == key), None)

    def append(self, line: Line) -> None:
        """Add a finished cell and put it on disk; a line cut short before it is taken away."""
        with self.locked("append", wait=True):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                file.seek(0)
                whole = file.read().rfind(b"\n") + 1
                file.truncate(whole)
                file.write((json.dumps(line) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())

    def replace(self, suite: str, rows: Sequence[Line]) -> None:
        """Put `rows` in the place of all lines of one suite."""
        with self.locked("append", wait=True):
            kept = [line for line in self.lines() if line.get("suite") != suite]
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in [*kept, *rows]).encode())

    @contextmanager
    def locked(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold the lock `name`; gives False where another process has it and `wait` is off."""
        self._locks.mkdir(parents=True, exist_ok=True)
        with (self._locks / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def written_once(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make the file where it is not there yet, whole or not at all; other processes wait for it."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".part")
            write(partial)
            partial.replace(path)


def pack_bits(correct: torch.Tensor) -> str:
    """A boolean (n) as hex, the first in the highest bit."""
    return np.packbits(correct.cpu().numpy().astype(np.uint8)).tobytes().hex()


def unpack_bits(text: str, count: int) -> torch.Tensor:
    """The boolean (count) that `pack_bits` wrote."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:count].astype(bool))


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided 95 % interval, in the units of what was averaged."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of the mean of independent values; without end where there is one value only."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    reach = student_quantile(level, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach)


def paired_difference(
    method: Sequence[torch.Tensor], baseline: Sequence[torch.Tensor], photos: Sequence[Sequence[str]]
) -> Interval:
    """How much better `method` does than `baseline`, in points, by photo.

    One entry a run: booleans (n), right or wrong, and the n photos they belong to. A photo tested by
    several runs counts once, with the mean of its differences; with one run a photo this is McNemar's
    comparison as an interval.
    """
    sums: dict[str, list[float]] = {}
    for ours, theirs, names in zip(method, baseline, photos, strict=True):
        for name, difference in zip(names, (ours.double() - theirs.double()).tolist(), strict=True):
            sums.setdefault(name, []).append(100 * difference)
    return mean_interval([statistics.fmean(values) for values in sums.values()])


def student_quantile(level: float, degrees: int) -> float:
    """The t with probability `level` between -t and t, by bisection of the integrated density."""
    low, high = 0.0, 1.0
    while _student_within(high, degrees) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_within(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def _student_within(t: float, degrees: int) -> float:
    # with x = sqrt(degrees) tan(angle) the density becomes a power of a cosine on a bounded interval
    top, steps = math.atan(t / math.sqrt(degrees)), 400
    values = [math.cos(top * i / steps) ** (degrees - 1) for i in range(steps + 1)]
    simpson = (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])) * top / steps / 3
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(math.pi) / 2
    return 2 * simpson * math.exp(log_scale)


def kept_for_backward(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Bytes kept from forward to backward: storages counted once, parameters, buffers and x left out."""
    own = [*model.parameters(), *model.buffers(), x]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
        total = sum(storage.nbytes() for storage in storages.values())
        del y
    return total


def provenance() -> Line:
    """Where and with what a number was measured: machine, versions, git commit."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "git": _commit(),
        "versions": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
