"""`edgetune report`"""

from __future__ import annotations

from edgetune.cli import options
from edgetune.cli.output import emit

EXAMPLES = (("edgetune report runs/flowers", "write report.html anew; it opens without a network connection"),)


def report(run: options.RunFolder, json: options.Json = None) -> None:
    """Write a run's report.html anew, from what its folder holds.

    Training does it by itself at the end; an interrupted run can be looked at this way.
    """
    import typer

    from edgetune.report import report as write

    path = write(run)
    emit(json, lambda: {"run": str(run), "report": str(path)}, lambda: typer.echo(str(path)))
