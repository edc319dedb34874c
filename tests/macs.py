"""A clock that no other process can disturb: time is the multiply-accumulates done so far, a millisecond each."""

from __future__ import annotations

import time
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

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
