"""edgetune: train, shrink and ship vision networks on small devices.

The names below are the public ones. Each is imported when it is first asked for, so that `edgetune --help` need not
wait for torch. Some functions bear the name of their module (`edgetune.plan`, `edgetune.train`): the attribute is
always the function, and `from edgetune.plan import ...` reaches the rest of the module.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgetune.apply import Undo, apply
    from edgetune.cache import Cache
    from edgetune.compress import compress
    from edgetune.contract import Plan
    from edgetune.data import Dataset, Preprocess, load_data
    from edgetune.errors import EdgetuneError
    from edgetune.graph import Graph, trace
    from edgetune.hold import hold
    from edgetune.models import load_model, load_weights
    from edgetune.plan import Budget, last_layers, plan
    from edgetune.profile import Cost, measure, profile
    from edgetune.report import report
    from edgetune.run import Run
    from edgetune.train import train

__version__ = "0.1.0"

_HOMES = {
    "EdgetuneError": "errors",
    "Graph": "graph",
    "trace": "graph",
    "Plan": "contract",
    "Undo": "apply",
    "apply": "apply",
    "Cost": "profile",
    "profile": "profile",
    "measure": "profile",
    "Budget": "plan",
    "plan": "plan",
    "last_layers": "plan",
    "load_model": "models",
    "load_weights": "models",
    "Dataset": "data",
    "Preprocess": "data",
    "load_data": "data",
    "Cache": "cache",
    "Run": "run",
    "hold": "hold",
    "train": "train",
    "compress": "compress",
    "report": "report",
}

__all__ = [
    "EdgetuneError",
    "trace",
    "Graph",
    "profile",
    "measure",
    "Cost",
    "plan",
    "last_layers",
    "Budget",
    "Plan",
    "apply",
    "Undo",
    "hold",
    "train",
    "compress",
    "Cache",
    "Run",
    "report",
    "load_model",
    "load_weights",
    "load_data",
    "Dataset",
    "Preprocess",
]


class _Package(ModuleType):
    """The package itself: finds its public names on demand, and keeps them from being hidden by their modules."""

    def __setattr__(self, name: str, value: Any) -> None:
        # importing edgetune.plan binds the module to the name of the function it holds: the function stays
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'edgetune' has no attribute '{name}'")
        importlib.import_module("edgetune.methods")  # a plan is read by the names of methods, which register themselves
        value = getattr(importlib.import_module(f"edgetune.{_HOMES[name]}"), name)
        super().__setattr__(name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__})


sys.modules[__name__].__class__ = _Package
