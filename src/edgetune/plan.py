"""model, Budget -> Plan: which layers learn and how each one's gradient is computed.

The planner weighs every layer's expected gain against its bytes and its time, solves the choice for every depth, and
then checks the plan with the very code that will run: its peak is predicted, and both are held by a real step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import nn

from edgetune.contract import Method, Plan
from edgetune.draft import last_layers
from edgetune.errors import BudgetError
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.prospect import Found, Prospect
from edgetune.record import Record
from edgetune.stopwatch import Progress
from edgetune.units import format_bytes, format_ms

DEFAULT_METHODS: tuple[Method, ...] = (Exact(), PooledChain(patch_px=2), PooledChain(patch_px=4),
                                       PooledChain(patch_px=7))
MARGIN = 0.97
"""Share of the budget that a prediction may fill: predicted and measured peaks differ by less than the rest."""
NEAR = 0.8
"""A larger micro-batch is taken where it gains at least this share of what the best one does."""
ROUNDS = 6
"""How many plans are tried by a real step, at most."""


class Budget(Record):
    """`memory_bytes`: training memory at its peak (gradients, optimizer state, kept bytes, transients; parameters and
    the batch stand beside it). `step_ms`: time of one step on this machine. Either may be absent."""

    memory_bytes: int | None = Field(None, gt=0)
    step_ms: float | None = Field(None, gt=0)


def plan(model: nn.Module, sample: torch.Tensor, budget: Budget,
         batch: tuple[torch.Tensor, torch.Tensor] | None = None, *, methods: Sequence[Method] = DEFAULT_METHODS,
         optimizer_copies: int = 1, progress: Progress | None = None) -> Plan:
    """Choose what learns, and how, to gain the most under the budget.

    `sample` x (n c h w) is a training batch; `batch` (x, y) calibrates importance and fidelity, by default the sample
    with labels drawn from the model. Among `methods` Exact must be one. Micro-batching is one of the planner's knobs.
    `progress` hears a sentence when layers have to be timed, which a budget with `step_ms` needs once a machine.
    Raises BudgetError, with the smallest budget that works, when not even the head can learn.
    """
    return Planner(model, sample, batch, methods=methods, optimizer_copies=optimizer_copies,
                   progress=progress).plan(budget)


class Planner:
    """Plans for one network under as many budgets as one likes; what `plan` is told of, it is told of once."""

    def __init__(self, model: nn.Module, sample: torch.Tensor,
                 batch: tuple[torch.Tensor, torch.Tensor] | None = None, *,
                 methods: Sequence[Method] = DEFAULT_METHODS, optimizer_copies: int = 1,
                 progress: Progress | None = None) -> None:
        self.prospect = Prospect(model, sample, methods, optimizer_copies, batch, progress)
        self.batch = len(sample)
        self._head_ms: dict[int, float] = {}

    def plan(self, budget: Budget) -> Plan:
        """As `plan`."""
        return self.find(budget).made

    def find(self, budget: Budget) -> Found:
        """The plan with its choices and what they sum to by prediction; the budget is held by real steps."""
        micro = self.micro_batch(budget)
        if budget.step_ms is None:
            return self._hold_bytes(budget.memory_bytes, None, micro)
        return self._hold_both(budget.memory_bytes, budget.step_ms, micro)

    def micro_batch(self, budget: Budget) -> int:
        """The largest micro-batch whose gain comes near the best one's: smaller ones cost time.

        Raises BudgetError where the head alone takes more memory or time than there is.
        """
        spare = {self.batch: None} if budget.memory_bytes is None else self._spare_bytes(budget.memory_bytes)
        order = list(spare)
        at, spare_ms = 0, None
        if budget.step_ms is not None:
            spare_ms = self._spare_ms(budget.step_ms, order[0])
        if len(order) > 1:
            gains = [self.prospect.solve(spare[micro], spare_ms, micro).total.gain for micro in order]
            at = next(i for i, gain in enumerate(gains) if gain >= NEAR * max(gains))
        while budget.step_ms is not None and at and self.head_ms(order[at]) > budget.step_ms:
            at -= 1
        return order[at]

    def _spare_bytes(self, memory_bytes: int) -> dict[int, float | None]:
        """Micro-batches with which the head can learn, largest first, and about how many bytes each leaves."""
        micro, spare = self.batch, dict[int, float | None]()
        least, most = (self.prospect.predicted_peak(self.prospect.head, micro) for micro in (1, self.batch))
        while micro >= 1:
            share = (micro - 1) / max(self.batch - 1, 1)
            left = memory_bytes * MARGIN - least - share * (most - least)
            if left >= 0:
                spare[micro] = left
            micro //= 2
        if not spare:
            smallest = int(least / MARGIN) + 1
            raise BudgetError(f"{format_bytes(memory_bytes)} is too little to train even the last layer: "
                              f"the smallest budget that works here is {format_bytes(smallest)} ({smallest} bytes)")
        return spare

    def _spare_ms(self, step_ms: float, micro: int) -> float:
        """What a step may take beyond one in which only the head learns. Raises BudgetError where nothing is left."""
        head = self.head_ms(micro)
        if head > step_ms:
            smallest = head / MARGIN
            raise BudgetError(f"{format_ms(step_ms)} is too little even when only the head learns: the smallest step "
                              f"time that works here is {format_ms(smallest)} ({smallest:.3f} ms); allow that, or use "
                              "a smaller batch or input")
        return max(MARGIN * step_ms - head, 0.0)

    def head_ms(self, micro: int) -> float:
        """How long a step takes in which only the head learns, measured once for each micro-batch."""
        if micro not in self._head_ms:
            self._head_ms[micro] = self.prospect.measured_ms(self.prospect.in_parts(self.prospect.head, micro))
        return self._head_ms[micro]

    def fill(self, allowed_bytes: int | None, spare_ms: float | None, micro: int, timed: bool = False) -> Found:
        """Solve, predict the peak, and give back or take away until the memory is filled and never exceeded."""
        if allowed_bytes is None:
            return self.prospect.solve(None, spare_ms, micro, timed)
        best = self.prospect.nothing(micro)
        capacity = allowed_bytes - self.prospect.predicted_peak(best.made, micro)
        for _ in range(ROUNDS):
            if capacity <= 0:
                break
            found = self.prospect.solve(capacity, spare_ms, micro, timed)
            spare = allowed_bytes - self.prospect.predicted_peak(found.made, micro)
            if spare >= 0 and found.total.gain >= best.total.gain:
                best = found
            if 0 <= spare < 0.05 * allowed_bytes:
                break
            if spare >= 0 and found.made == self.prospect.solve(2 * capacity, spare_ms, micro, timed).made:
                break
            capacity += spare if spare >= 0 else int(1.05 * spare)
        return best

    def _hold_bytes(self, memory_bytes: int | None, spare_ms: float | None, micro: int) -> Found:
        """Fill the memory by prediction, then hold it by one real step: what the device says has the last word."""
        if memory_bytes is None:
            return self.fill(None, spare_ms, micro)
        allowed = memory_bytes * MARGIN
        for _ in range(ROUNDS):
            found = self.fill(int(allowed), spare_ms, micro)
            took = self.prospect.measured_peak(found.made)
            if took <= memory_bytes:
                return found
            allowed *= 0.99 * memory_bytes / took
        return self.prospect.nothing(micro)

    def _hold_both(self, memory_bytes: int | None, step_ms: float, micro: int) -> Found:
        """Fill the time by what layers take alone, then by what a real step shows them to take together.

        A step that takes too long is taken back, one that leaves time is added to; of those that hold, the one that
        gains most is the answer, and the head alone holds always.
        """
        best, spare, head = self.prospect.nothing(micro), self._spare_ms(step_ms, micro), self.head_ms(micro)
        wanted = spare
        for _ in range(ROUNDS):
            found = self._hold_bytes(memory_bytes, spare, micro)
            if found.made == best.made or not found.total.learns:
                break
            took = self.prospect.measured_ms(found.made)
            real = max((took - head) / max(found.total.ms, 1e-6), 0.1)
            if took <= step_ms:
                best = max(best, found, key=lambda each: each.total.gain)
                if wanted / real < 1.05 * spare:
                    break
                spare = wanted / real
            else:
                spare = min(wanted / real, 0.9 * spare)
        return best


__all__ = ["Budget", "Planner", "last_layers", "plan"]
