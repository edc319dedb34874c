"""Watching a training: a bar in a terminal, a line an epoch in a pipe or a log."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from edgetune.cli.program import say

if TYPE_CHECKING:
    from edgetune.run import Epoch


class Bars:
    """One bar a training, with the accuracy reached so far; everything goes to standard error."""

    def __init__(self, epochs: int) -> None:
        console = Console(stderr=True)
        self.epochs, self.live = epochs, console.is_terminal
        self.bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task, self.title = TaskID(0), ""

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def start(self, title: str, total: int, done: int) -> None:
        """A training begins, or goes on from step `done`."""
        self.title = title
        self.task = self.bars.add_task(title, total=total, completed=done, told="")

    def advance(self) -> None:
        """One more step is done."""
        self.bars.advance(self.task)

    def epoch(self, number: int, row: Epoch) -> None:
        """One more epoch is done."""
        told = f"epoch {number}/{self.epochs}, accuracy {100 * row.val_accuracy:.1f} %"
        self.bars.update(self.task, told=told)
        if not self.live:
            sys.stderr.write(f"{self.title}: {told}, loss {row.train_loss:.3f}\n")

    def tell(self, sentence: str) -> None:
        """A sentence between the bars."""
        say(sentence)
