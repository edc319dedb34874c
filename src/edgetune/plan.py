"""model, Budget -> Plan: which layers learn and how each one's gradient is computed.

The planner weighs every layer's expected gain against its bytes and its time, solves the choice for every depth, and
then checks the plan with the very code that will run: its peak is predicted, and both are held by a real step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import nn

from edgetune.contract import KeptMethod, Method, Plan
from edgetune.draft import last_layers
from edgetune.errors import BudgetError, Refusal
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.mobiletl import MobileTL
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.prospect import Found, Prospect
from edgetune.record import Record
from edgetune.stopwatch import Progress
from edgetune.stretches import checkpointed
from edgetune.units import format_bytes, format_ms

DEFAULT_METHODS: tuple[Method, ...] = (
    Exact(), MobileTL(), SparseUpdate(ratio=1 / 2), SparseUpdate(ratio=1 / 4), SparseUpdate(ratio=1 / 8),
    PooledChain(patch_px=2), PooledChain(patch_px=4), PooledChain(patch_px=7))
"""What is weighed for every layer; what equals a simpler method on a network falls away there."""
MARGIN = 0.97
"""Share of the budget that a prediction may fill: predicted and measured peaks differ by less than the rest."""
NEAR = 0.8
"""A larger micro-batch is taken where it gains at least this share of what the best one does."""
ENOUGH = 0.9999
"""Memory is not filled further where so much is gained of what could be with all the memory there is."""
DEEPER = (4.0, 2.8, 2.0, 1.4)
"""Plans that need so many times the memory are tried with stretches that run again."""
ROUNDS, TIMED_ROUNDS = 6, 4
"""How many plans are tried by a real step, at most: for its memory, for its time."""


class Budget(Record):
    """`memory_bytes`: training memory at its peak (gradients, optimizer state, kept bytes, transients; parameters and
    the batch stand beside it). `step_ms`: time of one step on this machine. Either may be absent."""

    memory_bytes: int | None = Field(None, gt=0)
    step_ms: float | None = Field(None, gt=0)


def plan(model: nn.Module, sample: torch.Tensor, budget: Budget,
         batch: tuple[torch.Tensor, torch.Tensor] | None = None, *, methods: Sequence[Method] = DEFAULT_METHODS,
         holds: Sequence[KeptMethod] = (), recompute: bool = False, optimizer_copies: int = 1,
         progress: Progress | None = None) -> Plan:
    """Choose what learns, and how, to gain the most under the budget.

    `sample` x (n c h w) is a training batch; `batch` (x, y) calibrates importance and fidelity, by default the sample
    with labels drawn from the model. Among `methods` Exact must be one. Micro-batching is one of the planner's knobs.
    Plans that hold what they keep by one of `holds` are weighed against those that keep it as it is, and with
    `recompute` those of which stretches run again in backward, which takes time. `progress` hears a sentence when
    layers have to be timed, which a budget with `step_ms` needs once a machine.
    Raises BudgetError, with the smallest budget that works, when not even the head can learn.
    """
    _, found = best([Planner(model, sample, batch, methods=methods, optimizer_copies=optimizer_copies,
                             progress=progress, hold=hold, recompute=recompute and hold is None)
                     for hold in (None, *holds)], budget)
    return found.made


def best(planners: Sequence[Planner], budget: Budget) -> tuple[Planner, Found]:
    """The plan that gains most, and the planner that made it: the first of those that tie."""
    found = [(planner, planner.find(budget)) for planner in planners]
    return max(found, key=lambda each: each[1].total.gain)


class Planner:
    """Plans for one network under as many budgets as one likes; what `plan` is told of, it is told of once.

    With `recompute` stretches of its plans may run again in backward, where more learns that way. With `hold` every
    convolution of its plans holds what it keeps by that. What is held in as many bytes as data ask for counts with the
    most that its method allows: the method itself keeps to that, whatever data come later.
    """

    def __init__(self, model: nn.Module, sample: torch.Tensor,
                 batch: tuple[torch.Tensor, torch.Tensor] | None = None, *,
                 methods: Sequence[Method] = DEFAULT_METHODS, optimizer_copies: int = 1,
                 progress: Progress | None = None, hold: KeptMethod | None = None, recompute: bool = False) -> None:
        self.prospect = Prospect(model, sample, methods, optimizer_copies, batch, progress, hold)
        self.recompute = recompute
        self.batch = len(sample)
        self._head_ms: dict[int, float] = {}

    def plan(self, budget: Budget) -> Plan:
        """As `plan`."""
        return self.find(budget).made

    def find(self, budget: Budget) -> Found:
        """The plan with its choices and what they sum to by prediction; the budget is held by real steps.

        Where a real step takes so much more memory than predicted that too little is left to gain, smaller
        micro-batches are tried.
        """
        found = self._find(budget)
        again = self._find_again(budget, found) if self.recompute and budget.memory_bytes is not None else None
        return again or found

    def _find(self, budget: Budget) -> Found:
        micro, expected = self.micro_batch(budget)
        best: Found | None = None
        while True:
            found = self._hold(budget, micro)
            if found is not None and (best is None or found.total.gain > best.total.gain):
                best = found
            enough = best is not None and (budget.step_ms is not None or best.total.gain >= NEAR * expected)
            if budget.memory_bytes is None or enough or micro == 1:
                break
            micro //= 2
        if best is None:
            if budget.step_ms is not None and self._head(budget.memory_bytes, micro) is not None:
                self._spare_ms(budget.step_ms, micro)  # raises: parts as small as the memory asks for take too long
            raise self._too_little(budget.memory_bytes)
        return best

    def _find_again(self, budget: Budget, found: Found) -> Found | None:
        """A plan that gains more than `found`, as stretches of it run again in backward; None where there is none.

        The largest parts of the batch are tried first: what does not fit in one part may fit in smaller ones.
        """
        memory, micro = budget.memory_bytes or 0, self.batch
        while micro >= 1:
            tried = list[Plan]()  # several amounts of memory may lead to one plan
            for wanted in (None, *(int(share * memory) for share in DEEPER)):
                deeper = self.fill(wanted, None, micro)
                if deeper.total.gain <= found.total.gain or deeper.made in tried:
                    continue
                tried.append(deeper.made)
                if (made := self._again(deeper, budget)) is not None:
                    return replace(deeper, made=made)
            micro //= 2
        return None

    def _again(self, deeper: Found, budget: Budget) -> Plan | None:
        """The plan of `deeper` with the stretches by which it keeps to the budget, if there are such."""
        memory, prospect = budget.memory_bytes or 0, self.prospect
        allowed = int(memory * MARGIN)
        for _ in range(ROUNDS):
            try:
                made = checkpointed(prospect.model, prospect.sample, deeper.made, memory_bytes=allowed,
                                    optimizer_copies=prospect.copies, graph=prospect.graph)
            except (BudgetError, Refusal):
                return None
            took = prospect.measured_peak(made)
            if took <= memory:
                in_time = budget.step_ms is None or prospect.measured_ms(made) <= budget.step_ms
                return made if in_time else None
            allowed = int(0.99 * allowed * memory / took)
        return None

    def micro_batch(self, budget: Budget) -> tuple[int, float]:
        """The largest micro-batch whose gain comes near the best one's, as smaller ones cost time; and its gain.

        Raises BudgetError where the head alone takes more memory or time than there is.
        """
        spare = {self.batch: None} if budget.memory_bytes is None else self._spare_bytes(budget.memory_bytes)
        order, at, gains = list(spare), 0, [0.0]
        spare_ms = None if budget.step_ms is None else self._spare_ms(budget.step_ms, order[0])
        if budget.memory_bytes is not None:
            gains = [self.prospect.solve(spare[micro], spare_ms, micro).total.gain for micro in order]
            at = next(i for i, gain in enumerate(gains) if gain >= NEAR * max(gains))
        while budget.step_ms is not None and at and self.head_ms(order[at]) > budget.step_ms:
            at -= 1
        return order[at], gains[at]

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
            raise self._too_little(memory_bytes)
        return spare

    def _too_little(self, memory_bytes: int | None) -> BudgetError:
        head = self.prospect.nothing(1).made
        smallest = max(int(self.prospect.predicted_peak(head, 1) / MARGIN) + 1, self.prospect.measured_peak(head))
        return BudgetError(f"{format_bytes(memory_bytes or 0)} is too little to train even the last layer: the "
                           f"smallest budget that works here is {format_bytes(smallest)} ({smallest} bytes)")

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
        free = self.prospect.solve(None, spare_ms, micro, timed)
        if allowed_bytes is None or self.prospect.predicted_peak(free.made, micro) <= allowed_bytes:
            return free
        best = self.prospect.nothing(micro)
        capacity = allowed_bytes - self.prospect.predicted_peak(best.made, micro)
        for _ in range(ROUNDS):
            if capacity <= 0:
                break
            found = self.prospect.solve(capacity, spare_ms, micro, timed)
            spare = allowed_bytes - self.prospect.predicted_peak(found.made, micro)
            if spare >= 0 and found.total.gain >= best.total.gain:
                best = found
            if 0 <= spare < 0.05 * allowed_bytes or (spare >= 0 and best.total.gain >= ENOUGH * free.total.gain):
                break
            capacity += spare if spare >= 0 else int(1.05 * spare)
        return best

    def _hold(self, budget: Budget, micro: int) -> Found | None:
        """The best plan that real steps show to keep to the budget; None where not even the head does."""
        if budget.step_ms is None:
            return self._hold_bytes(budget.memory_bytes, None, micro)
        if self.head_ms(micro) > budget.step_ms:
            return None
        return self._hold_ms(budget.memory_bytes, budget.step_ms, micro)

    def _hold_bytes(self, memory_bytes: int | None, spare_ms: float | None, micro: int) -> Found | None:
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
        return self._head(memory_bytes, micro)

    def _head(self, memory_bytes: int | None, micro: int) -> Found | None:
        """The plan in which only the head learns, if a real step keeps to the memory."""
        head = self.prospect.nothing(micro)
        fits = memory_bytes is None or self.prospect.measured_peak(head.made) <= memory_bytes
        return head if fits else None

    def _hold_ms(self, memory_bytes: int | None, step_ms: float, micro: int) -> Found | None:
        """Fill the time by what layers take alone, then by what a real step shows them to take together.

        A step that takes too long is taken back, one that leaves time is added to; of those that hold, the one that
        gains most is the answer.
        """
        best, head = self._head(memory_bytes, micro), self.head_ms(micro)
        spare = wanted = self._spare_ms(step_ms, micro)
        for _ in range(TIMED_ROUNDS if best is not None else 0):
            found = self._hold_bytes(memory_bytes, spare, micro)
            if best is None or found is None or found.made == best.made:
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


__all__ = ["Budget", "Planner", "best", "last_layers", "plan"]
