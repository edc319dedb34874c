"""Every method, found by walking the folders: one paper, one file. There is no list to edit."""

from __future__ import annotations

import importlib
import pkgutil


def discover() -> None:
    """Import every method file, so that it registers itself; files that begin with an underscore are left out."""
    for family in pkgutil.iter_modules(__path__, f"{__name__}."):
        package = importlib.import_module(family.name)
        for file in pkgutil.iter_modules(getattr(package, "__path__", []), f"{family.name}."):
            if not file.name.rpartition(".")[2].startswith("_"):
                importlib.import_module(file.name)


discover()
