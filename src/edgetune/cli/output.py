"""Tables for people and JSON for programs: every verb that tells something prints through here."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PLAIN_WIDTH = 140
"""Columns of a table that goes into a pipe or a file, where no terminal states its own width."""


def console() -> Console:
    """Standard output as rich sees it; wide where it is no terminal, so that piped tables are never cut."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(width=width, highlight=False)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    last: Sequence[str] | None = None,
) -> Table:
    """A table whose first column is left-aligned and the others right-aligned; `last` stands under a rule.

    Where the terminal is narrow, cells go on in the next line: nothing is cut off.
    """
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_footer=last is not None,
        pad_edge=False,
    )
    for number, name in enumerate(columns):
        made.add_column(
            name,
            justify="left" if number == 0 else "right",
            overflow="fold",
            header_style="dim",
            footer=last[number] if last is not None else "",
        )
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    return made


def emit(json_to: str | None, content: Callable[[], Mapping[str, Any]], show: Callable[[], None]) -> None:
    """Print `show()` for a person; with --json write `content()` instead: to standard output for "-", else to a file.

    Raises RunError when the file cannot be written.
    """
    if json_to is None:
        show()
        return
    text = json.dumps(content(), indent=2, default=str) + "\n"
    if json_to == "-":
        sys.stdout.write(text)
        return
    from edgetune.record import atomic_write

    atomic_write(Path(json_to), text.encode())


def facts(title: str, pairs: Sequence[tuple[str, str]]) -> Table:
    """Names and what they are, line by line, without a header."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in pairs:
        made.add_row(f"  {name}", escape(value))
    made.add_section()
    made.add_row("", "")
    return made
