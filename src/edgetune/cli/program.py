"""How every verb behaves: refusals in one sentence with exit status 2, Ctrl-C with 130, `--json` without a file."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from edgetune.errors import EdgetuneError

REFUSED, INTERRUPTED = 2, 130


class Program(TyperGroup):
    """The whole command line. What edgetune refuses knowingly becomes a sentence; any other error keeps its trace."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            return super().invoke(ctx)
        except EdgetuneError as refusal:
            from edgetune.run import Interrupted  # not at the top: it brings torch with it

            say(str(refusal))
            raise typer.Exit(INTERRUPTED if isinstance(refusal, Interrupted) else REFUSED) from refusal
        except KeyboardInterrupt as stop:
            say(str(stop) or "stopped")
            raise typer.Exit(INTERRUPTED) from stop


class Verb(TyperCommand):
    """One verb. `--json` alone means standard output; `--json out.json` names a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give every bare `--json` its "-"."""
        given: list[str] = []
        for number, word in enumerate(args):
            given.append(word)
            following = args[number + 1] if number + 1 < len(args) else ""
            if word == "--json" and following != "-" and not following.endswith(".json"):
                given.append("-")
        return super().parse_args(ctx, given)


def say(sentence: str) -> None:
    """One line on standard error, whole, however long it is."""
    sys.stderr.write("edgetune: " + " ".join(sentence.split()) + "\n")
    sys.stderr.flush()


def shortened(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list that may be long."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def examples(*pairs: tuple[str, str]) -> str:
    """The end of a verb's help: commands, each under what it does."""
    return "\n".join(
        ["[bold]Examples[/bold]", *(f"[dim]# {what}[/dim]\n[cyan]{command}[/cyan]" for command, what in pairs)]
    )


def paragraphs(verb: Callable[..., None]) -> str:
    """A verb's docstring with its lines joined, so that help fills whatever width the terminal has."""
    return "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(verb) or "").split("\n\n"))
