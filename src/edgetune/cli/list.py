"""`edgetune list`"""

from __future__ import annotations

from typing import Any

from edgetune.cli import options
from edgetune.cli.output import console, emit, facts

EXAMPLES = (
    ("edgetune list", "networks, data and methods by name"),
    ("edgetune list --json -", "the same for a program"),
)


def list_(json: options.Json = None) -> None:
    """List the names that other verbs take: built-in networks, data sets, and methods.

    Networks marked with a width also answer to NAME_0.35. Beside these, --model takes timm:NAME, torchvision:NAME and
    package.module:callable, and --data takes folders and npz files.
    """
    found = _gather()
    emit(json, lambda: found, lambda: _show(found))


def _gather() -> dict[str, Any]:
    import edgetune.methods  # noqa: F401  (methods register themselves)
    from edgetune.contract import REGISTRY
    from edgetune.data import list_data
    from edgetune.models import list_models

    own = {name: kind for name, kind in sorted(REGISTRY.items()) if kind.__module__.startswith("edgetune.")}
    return {
        "models": {card.name: card.description for card in list_models()},
        "data": list_data(),
        "methods": {name: kind.explain().splitlines()[0] for name, kind in own.items()},
        "arithmetic": [name for name, kind in own.items() if kind.family == "arithmetic"],
    }


def _show(found: dict[str, Any]) -> None:
    methods = found["methods"].items()
    shown = {
        "models (--model)": list(found["models"].items()),
        "data (--data)": list(found["data"].items()),
        "methods (edgetune explain NAME)": [pair for pair in methods if pair[0] not in found["arithmetic"]],
        "arithmetic methods (edgetune compress --method)": [pair for pair in methods if pair[0] in found["arithmetic"]],
    }
    for title, pairs in shown.items():
        console().print(facts(title, pairs))
