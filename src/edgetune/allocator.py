"""What the allocator really gave out: the peak of a piece of work, library scratch memory included."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profiler


def peak_during(device: torch.device, work: Callable[[], None]) -> int:
    """The most bytes that `work` held at once beyond what was allocated before it."""
    return _PEAKS.get(device.type, _cpu_peak)(device, work)


def _cuda_peak(device: torch.device, work: Callable[[], None]) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(device: torch.device, work: Callable[[], None]) -> int:
    """From the allocator's own events, as torch's profiler records them."""
    recorder = torch_profiler(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _without_collection():
        with _quiet():
            recorder.start()
        try:
            work()
        finally:
            with _quiet():
                recorder.stop()
    assert recorder.profiler is not None and recorder.profiler.kineto_results is not None
    events: list[Any] = recorder.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        live += size
        peak = max(peak, live)
    return peak


@contextmanager
def _without_collection() -> Iterator[None]:
    """Garbage from before must not be freed inside: it would count against the peak."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler announces its start and stop on the process's error stream, whatever its log level."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


_PEAKS = {"cuda": _cuda_peak}
