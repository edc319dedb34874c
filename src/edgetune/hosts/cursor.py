"""Which call a host is working on, for whoever watches a step from outside: one segment is one node to autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from edgetune.graph import Call

Apart = tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]
"""What a host finds again in backward: its parameters, and what its rule keeps."""

_CURRENT: ContextVar[Call | None] = ContextVar("edgetune_current_call", default=None)
_PASSES: ContextVar[Passes | None] = ContextVar("edgetune_passes", default=None)
_WATCHER: ContextVar[Callable[[Call | None], None] | None] = ContextVar("edgetune_watcher", default=None)


def working_on(call: Call | None) -> None:
    """Say that what follows in this thread belongs to `call`."""
    _CURRENT.set(call)
    watcher = _WATCHER.get()
    if watcher is not None:
        watcher(call)


def current_call() -> Call | None:
    """The call that a host of this thread said last that it works on."""
    return _CURRENT.get()


@contextmanager
def watched_by(watcher: Callable[[Call | None], None]) -> Iterator[None]:
    """Let `watcher` hear of every `working_on` of this thread inside the block."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


class Passes:
    """A stretch that runs forward twice: what its hosts keep is there only from the second pass on, by their order."""

    def __init__(self) -> None:
        self.first = True
        self._kept: list[Apart | None] = []
        self._at = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """One of the passes, in this thread."""
        token, self._at = _PASSES.set(self), 0
        try:
            yield
        finally:
            self.first = False
            _PASSES.reset(token)

    def place(self, given: Apart | None) -> int:
        """The place of the host whose turn it is; `given` stays there until it is taken."""
        place, self._at = self._at, self._at + 1
        self._kept[place:place + 1] = [given]
        return place

    def take(self, place: int) -> Apart:
        """What the host at that place has kept. Raises RuntimeError where it has been taken already."""
        given, self._kept[place] = self._kept[place], None
        if given is None:
            raise RuntimeError("what a stretch keeps was read twice: let it run again in between")
        return given


def current_passes() -> Passes | None:
    """Those of the stretch that this thread is inside of."""
    return _PASSES.get()
