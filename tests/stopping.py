"""A training that is interrupted, and few digits for it."""

from __future__ import annotations

from edgetune.data import Dataset, Preprocess, load_data
from edgetune.loop import Silent
from edgetune.models import model_card
from edgetune.run import Epoch


class Stop(Silent):
    """Interrupts after the first epoch of the planned training."""

    def epoch(self, number: int, row: Epoch) -> None:
        raise KeyboardInterrupt


def few_digits() -> Dataset:
    return load_data("digits", Preprocess.from_input(model_card("digits_net").input), limit=24)
