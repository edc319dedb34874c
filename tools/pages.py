"""The pages of the methods, docs/methods/NAME.md, from the docstrings that `edgetune explain NAME` prints."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path

from pydantic_core import PydanticUndefined

import edgetune.methods  # noqa: F401  (fills the registry)
from edgetune.contract import HEADINGS, REGISTRY, Method

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "methods"
VERBATIM = {"Shapes", "What is kept (bytes)"}


def methods() -> dict[str, type[Method]]:
    """The package's own methods by name."""
    return {
        name: kind
        for name, kind in sorted(REGISTRY.items())
        if kind.__module__.startswith("edgetune.methods.")
    }


def sections(docstring: str) -> list[tuple[str, str]]:
    """A docstring cut at its headings: (heading, text); what comes before the first has an empty heading."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in inspect.cleandoc(docstring).splitlines():
        if line in HEADINGS:
            found.append((line, []))
        else:
            found[-1][1].append(line)
    return [(heading, textwrap.dedent("\n".join(lines)).strip()) for heading, lines in found]


def settings(kind: type[Method]) -> list[str]:
    """The settings as a table: name, type, default, meaning."""
    if not kind.model_fields:
        return ["It has no settings."]
    rows = ["| setting | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in kind.model_fields.items():
        default = "required" if field.default is PydanticUndefined else f"`{field.default!r}`"
        written = inspect.formatannotation(field.annotation).replace("typing.", "").replace("|", r"\|")
        rows.append(f"| `{name}` | {written} | {default} | {field.description or ''} |")
    return rows


def page(name: str, kind: type[Method]) -> str:
    """The page of one method."""
    (_, opening), *rest = sections(kind.explain())
    lines = [f"# {name}", "", opening, "", f"Family: {kind.family}. Forward: {kind.forward_is}.", ""]
    for heading, content in rest:
        body = f"```text\n{content}\n```" if heading in VERBATIM else content.replace("**", r"\*\*")
        lines += [f"## {heading}", "", body, ""]
    lines += [
        "## Settings",
        "",
        *settings(kind),
        "",
        f"*Written by `make docs` from `{kind.__module__}`; `edgetune explain {name}` prints the same.*",
        "",
    ]
    return "\n".join(lines)


def documents() -> dict[Path, str]:
    """Every page of docs/methods, its index included."""
    pages = {FOLDER / f"{name}.md": page(name, kind) for name, kind in methods().items()}
    firsts = {name: sections(kind.explain())[0][1].splitlines()[0] for name, kind in methods().items()}
    index = ["# Methods", "", *(f"- [{name}]({name}.md): {first}" for name, first in firsts.items()), ""]
    return {FOLDER / "README.md": "\n".join(index), **pages}
