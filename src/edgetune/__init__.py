"""edgetune: train, shrink and ship vision networks on small devices."""

from __future__ import annotations

from edgetune import methods as _methods  # noqa: F401  (methods register themselves)
from edgetune.apply import Undo, apply
from edgetune.contract import Plan
from edgetune.errors import EdgetuneError
from edgetune.graph import Graph, trace

__all__ = ["EdgetuneError", "Graph", "Plan", "Undo", "apply", "trace"]
