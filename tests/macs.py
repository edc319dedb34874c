"""A clock that no other process can disturb: time is the multiply-accumulates done so far, a millisecond each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune import kernels
from edgetune.meter import PRODUCTS


class MacClock(TorchDispatchMode):
    """Inside the block `time.perf_counter` counts what this thread multiplies."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.macs = 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.macs / 1e3)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.macs += PRODUCTS[func](args, out)
        return out


@contextmanager
def times_that_count_macs(cache: Path) -> Iterator[None]:
    """Planners made inside time by that clock, the same on every machine, and remember their times in `cache`."""
    kernels.status()  # compiled before, in the usual folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGETUNE_CACHE", str(cache))
        with MacClock(patch):
            yield
