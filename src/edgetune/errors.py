"""What edgetune refuses, and why.

EdgetuneError
├── Refusal        a layer or model that a method cannot take: names the layer, the reason, the way out
├── PlanError      a plan that does not fit its model, or cannot be read
├── BudgetError    a budget that cannot be met, or cannot be parsed
├── DataError      pictures, labels or folders that cannot be used
├── WeightsError   a weights file that does not fit, or may not be opened
├── ModelError     a network that is unknown or cannot be built
├── RunError       a run folder that cannot be read, resumed or written
└── DivergedError  training met a loss that is not a number

Every message is one sentence: the thing, the reason, the way out. The command line prints it and exits with 2.
"""

from __future__ import annotations


class EdgetuneError(Exception):
    """Base of every refusal; its text is meant to be shown to a person as it stands."""


class Refusal(EdgetuneError):
    """A layer or model that a method cannot take.

    `layer` is the qualified name, `reason` a clause without a full stop, `way_out` what to do instead.
    """

    def __init__(self, layer: str, reason: str, way_out: str) -> None:
        self.layer, self.reason, self.way_out = layer, reason, way_out
        super().__init__(f"layer '{layer}' {reason}: {way_out}")


class PlanError(EdgetuneError):
    """A plan that does not fit its model, or cannot be read."""


class BudgetError(EdgetuneError):
    """A budget that cannot be met, or cannot be parsed."""


class DataError(EdgetuneError):
    """Pictures, labels or folders that cannot be used."""


class WeightsError(EdgetuneError):
    """A weights file that does not fit its network, or may not be opened."""


class ModelError(EdgetuneError):
    """A network that is unknown or cannot be built."""


class RunError(EdgetuneError):
    """A run folder that cannot be read, resumed or written."""


class DivergedError(EdgetuneError):
    """Training met a loss that is not a number; the last good weights are kept."""
