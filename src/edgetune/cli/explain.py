"""`edgetune explain`"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgetune.cli import options
from edgetune.cli.output import emit

if TYPE_CHECKING:
    from edgetune.contract import Method

EXAMPLES = (
    ("edgetune explain pooled_chain", "what it does, keeps and changes, and when not to use it"),
    ("edgetune list", "the names of all methods"),
)


def explain(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A method.", show_default=False)],
    json: options.Json = None,
) -> None:
    """Explain a method: what it does, its shapes, what it keeps, what it changes, when not to use it, its source."""
    method = find_method(name)
    emit(json, lambda: describe(method), lambda: typer.echo(method.explain()))


def find_method(name: str) -> type[Method]:
    """The method of that name; case and hyphens are forgiven. Raises EdgetuneError with the nearest names."""
    import edgetune.methods  # noqa: F401  (methods register themselves)
    from edgetune.contract import REGISTRY
    from edgetune.errors import EdgetuneError

    known = name.strip().lower().replace("-", "_").replace(" ", "_")
    if known in REGISTRY:
        return REGISTRY[known]
    near = difflib.get_close_matches(known, REGISTRY, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(REGISTRY))}"
    raise EdgetuneError(f"method '{name}' is unknown: {hint}")


def describe(method: type[Method]) -> dict[str, Any]:
    """A method as plain data: its settings with their defaults, and its page."""
    from pydantic_core import PydanticUndefined

    settings = {
        field: {
            "type": str(info.annotation),
            "description": info.description,
            "default": None if info.default is PydanticUndefined else info.default,
        }
        for field, info in method.model_fields.items()
    }
    return {
        "name": method.method,
        "family": method.family,
        "forward_is": method.forward_is,
        "settings": settings,
        "text": method.explain(),
    }
