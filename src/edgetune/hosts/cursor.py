"""Which call a host is working on, for whoever watches a step from outside: one segment is one node to autograd."""

from __future__ import annotations

from contextvars import ContextVar

from edgetune.graph import Call

_CURRENT: ContextVar[Call | None] = ContextVar("edgetune_current_call", default=None)


def working_on(call: Call | None) -> None:
    """Say that what follows in this thread belongs to `call`."""
    _CURRENT.set(call)


def current_call() -> Call | None:
    """The call that a host of this thread said last that it works on."""
    return _CURRENT.get()
