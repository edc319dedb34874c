"""Which call a host is working on, for whoever watches a step from outside: one segment is one node to autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from edgetune.graph import Call

_CURRENT: ContextVar[Call | None] = ContextVar("edgetune_current_call", default=None)
_AGAIN: ContextVar[bool] = ContextVar("edgetune_runs_again", default=False)
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


@contextmanager
def made_again() -> Iterator[None]:
    """What runs in the block of this thread runs again in backward, or does so now: nothing that it saves is kept."""
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)


def is_made_again() -> bool:
    """Whether this thread is inside such a block."""
    return _AGAIN.get()
