"""model, Budget -> Plan: which layers learn and how each one's gradient is computed.

The planner weighs every layer's expected gain against its bytes, solves the choice exactly for every depth, and then
checks the plan by predicting its peak with the very code that will run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import nn

from edgetune.apply import apply
from edgetune.calibrate import Calibration, calibrate, drawn_labels
from edgetune.contract import Method, Plan
from edgetune.errors import BudgetError, PlanError
from edgetune.graph import Call, Graph, trace
from edgetune.knapsack import Choice, best_choices
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.profile import measure, measured_peak, predicted_peak, profile
from edgetune.record import Record
from edgetune.units import format_bytes, format_ms

DEFAULT_METHODS: tuple[Method, ...] = (Exact(), PooledChain(patch_px=2), PooledChain(patch_px=4),
                                       PooledChain(patch_px=7))
MARGIN = 0.97
"""Share of the budget that a prediction may fill: predicted and measured peaks differ by less than the rest."""


NEAR = 0.8
"""A larger micro-batch is taken where it gains at least this share of what the best one does."""


class Budget(Record):
    """`memory_bytes`: training memory at its peak (gradients, optimizer state, kept bytes, transients; parameters and
    the batch stand beside it). `step_ms`: time of one step on this machine. Either may be absent."""

    memory_bytes: int | None = Field(None, gt=0)
    step_ms: float | None = Field(None, gt=0)


def last_layers(graph: Graph, count: int | None, method: Method, *, scales: bool = False) -> Plan:
    """The plan in which the last `count` convolutions (None: all) learn by `method`, and all that follows learns too.

    Norms after the first learning convolution train their shift, and their scale with `scales`; linear layers train.
    Raises PlanError when the graph has fewer convolutions than asked for.
    """
    convs = graph.layers("conv")
    if count is not None and count > len(convs):
        raise PlanError(f"the last {count} convolutions are asked for, but the network has {len(convs)}: "
                        f"ask for at most {len(convs)}")
    chosen = list(convs if count is None else convs[len(convs) - count:])
    return _write(graph, {call.node: method for call in chosen}, frozenset(call.node for call in chosen),
                  scales=scales)


def plan(model: nn.Module, sample: torch.Tensor, budget: Budget,
         batch: tuple[torch.Tensor, torch.Tensor] | None = None, *, methods: Sequence[Method] = DEFAULT_METHODS,
         optimizer_copies: int = 1) -> Plan:
    """Choose what learns, and how, to gain the most under the budget.

    `sample` x (n c h w) is a training batch; `batch` (x, y) calibrates importance and fidelity, by default the sample
    with labels drawn from the model. Among `methods` Exact must be one. Micro-batching is one of the planner's knobs.
    Raises BudgetError, with the smallest budget that works, when not even the head can learn.
    """
    planner = _Planner(model, sample, tuple(methods), optimizer_copies, batch)
    if budget.memory_bytes is None:
        micro, made = len(sample), planner.solve(None, len(sample))
    else:
        micro = planner.micro_batch(budget.memory_bytes)
        made = planner.fit(budget.memory_bytes, micro)
    if budget.step_ms is not None:
        made = planner.hold_time(made, budget.step_ms)
    return made


@dataclass
class _Solved:
    gain: float
    made: Plan


class _Planner:
    """What does not change while budgets and micro-batches are tried."""

    def __init__(self, model: nn.Module, sample: torch.Tensor, methods: tuple[Method, ...], copies: int,
                 batch: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        self.model, self.sample, self.methods, self.copies = model, sample, methods, copies
        self.graph = trace(model, sample[:1]).model_copy(update={"input_shape": tuple(sample.shape)})
        self.convs = self.graph.layers("conv")
        whole = [last_layers(self.graph, None, method) for method in methods]
        batch = batch or (sample, drawn_labels(model, sample))
        self.worth: Calibration = calibrate(model, self.graph, batch, whole, methods)
        one = [made.model_copy(update={"micro_batch": 1}) for made in whole]
        self.kept = {method: self._kept(made) for method, made in zip(methods, one, strict=True)}
        self.faith = {method: _faith([self.worth.fidelity[method].get(c.name, 0.0) for c in self.convs])
                      for method in methods}
        self.head = _write(self.graph, {}, frozenset())

    def solve(self, capacity_bytes: int | None, micro: int) -> Plan:
        return self._solve(capacity_bytes, micro).made

    def fit(self, memory_bytes: int, micro: int) -> Plan:
        """Fill the budget by prediction, then hold it by one real step: what the device says has the last word."""
        allowed = memory_bytes * MARGIN
        for _ in range(4):
            made = self._fill(int(allowed), micro)
            took = measured_peak(self._applied(made), self.sample, optimizer_copies=self.copies,
                                 micro_batch=made.micro_batch)
            if took <= memory_bytes:
                return made
            allowed *= 0.99 * memory_bytes / took
        return self._with_part(self.head, micro)

    def _fill(self, allowed: int, micro: int) -> Plan:
        """Solve, predict the peak, and give back or take away until the budget is filled and never exceeded."""
        best = _Solved(0.0, self._with_part(self.head, micro))
        capacity = allowed - self._peak(self.head, micro)
        for _ in range(6):
            if capacity <= 0:
                break
            found = self._solve(capacity, micro)
            spare = allowed - self._peak(found.made, micro)
            if spare >= 0 and found.gain >= best.gain:
                best = found
            if 0 <= spare < 0.05 * allowed or (spare >= 0 and found.made == self._solve(2 * capacity, micro).made):
                break
            capacity += spare if spare >= 0 else int(1.05 * spare)
        return best.made

    def micro_batch(self, memory_bytes: int) -> int:
        """The largest micro-batch whose gain comes near the best one's: smaller ones cost time."""
        micro, tried = len(self.sample), []
        smallest_peak, largest_peak = self._peak(self.head, 1), self._peak(self.head, micro)
        while micro >= 1:
            share = (micro - 1) / max(len(self.sample) - 1, 1)
            spare = int(memory_bytes * MARGIN - smallest_peak - share * (largest_peak - smallest_peak))
            if spare >= 0:
                tried.append((micro, self._solve(spare, micro).gain))
            micro //= 2
        if not tried:
            smallest = int(smallest_peak / MARGIN) + 1
            raise BudgetError(f"{format_bytes(memory_bytes)} is too little to train even the last layer: "
                              f"the smallest budget that works here is {format_bytes(smallest)} ({smallest} bytes)")
        most = max(gain for _, gain in tried)
        return next(micro for micro, gain in tried if gain >= NEAR * most)

    def hold_time(self, made: Plan, step_ms: float) -> Plan:
        """Freeze from the input on until a measured step is fast enough."""
        while True:
            took = measure(self._applied(made), self.sample, micro_batch=made.micro_batch, repeats=3).step_ms or 0.0
            if took <= step_ms:
                return made
            learning = [call for call in self.convs if "weight" in made.learns.get(call.name, ())]
            if not learning:
                raise BudgetError(f"a step takes {format_ms(took)} even when only the head learns, more than "
                                  f"{format_ms(step_ms)}: use a smaller batch or input, or allow that time")
            # time grows about evenly with depth: drop that share of the layers, at least one
            keep = min(int(len(learning) * step_ms / took), len(learning) - 1)
            chosen = frozenset(call.node for call in learning[len(learning) - keep:])
            settings = {call.node: made.layers[call.name][0] for call in self.convs if call.name in made.layers}
            made = self._with_part(_write(self.graph, settings, chosen), made.micro_batch or len(self.sample))

    def _solve(self, capacity_bytes: int | None, micro: int) -> _Solved:
        layers = [self._choices(index, micro) for index in range(len(self.convs))]
        capacity = sum(max(c.weight_bytes for c in choices) for choices in layers) * 2 if capacity_bytes is None \
            else capacity_bytes
        gain, picked = best_choices(layers, capacity)
        settings, learning = {}, set()
        for call, pick in zip(self.convs, picked, strict=True):
            if pick is not None:
                settings[call.node] = self.methods[pick % len(self.methods)]
                learning |= {call.node} if pick < len(self.methods) else set()
        made = _write(self.graph, settings, frozenset(learning))
        return _Solved(gain, self._with_part(made, micro))

    def _choices(self, index: int, micro: int) -> list[Choice]:
        """For each method, in order: learning by it; then, for each, only letting the gradient pass by it."""
        call = self.convs[index]
        params = 4 * (1 + self.copies) * sum(_count(call.param_shapes[role]) for role in ("weight", "bias")
                                             if role in call.params)
        learning, passing = [], []
        for method in self.methods:
            own, after = self.kept[method][call.node]
            faith, passes = self.faith[method][index]
            worth = self.worth.importance.get(call.name, 0.0) * faith
            learning.append(Choice((own + after) * micro + params, worth, passes))
            passing.append(Choice(after * micro, 0.0, passes, learns=False))
        return [*learning, *passing]

    def _kept(self, made: Plan) -> dict[str, tuple[int, int]]:
        """Bytes that one sample keeps at each convolution: (its own, those of the calls up to the next one)."""
        cost = profile(self.model, self.sample[:1], made, optimizer_copies=0, graph=self.graph)
        by_name = {layer.name: layer.kept_bytes for layer in cost.layers}
        calls = {name: sum(call.name == name for call in self.graph.calls) for name in by_name}
        shares: dict[str, tuple[int, int]] = {}
        current: str | None = None
        for call in self.graph.calls:
            share = -(-by_name.get(call.name, 0) // max(calls.get(call.name, 1), 1))
            if call.kind == "conv":
                current = call.node
                shares[current] = (share, 0)
            elif current is not None and call.kind != "linear":
                shares[current] = (shares[current][0], shares[current][1] + share)
        return shares

    def _peak(self, made: Plan, micro: int) -> int:
        return predicted_peak(self.model, self.sample, self._with_part(made, micro), self.graph,
                              optimizer_copies=self.copies)

    def _with_part(self, made: Plan, micro: int) -> Plan:
        return made.model_copy(update={"micro_batch": None if micro >= len(self.sample) else micro})

    def _applied(self, made: Plan) -> nn.Module:
        twin = copy.deepcopy(self.model)
        apply(twin, made, self.graph)
        return twin


def _faith(cosines: list[float]) -> list[tuple[float, float]]:
    """For each layer, input to output: how faithful its own weight gradient is, and which share of faith it passes on.

    `cosines` are those of a whole network on one method, so each is a layer's own times the shares of all behind it.
    """
    faith: list[tuple[float, float]] = []
    through = 1.0
    for index in range(len(cosines) - 1, -1, -1):
        here = min(max(cosines[index], 0.0), through)
        before = max(cosines[index - 1], 0.0) if index else 0.0
        passes = min(before / here, 1.0) if here > 0 else 0.0
        faith.append((here / through if through > 0 else 0.0, passes))
        through *= passes
    return faith[::-1]


def _write(graph: Graph, settings: dict[str, Method], learning: frozenset[str], scales: bool = False) -> Plan:
    """The plan in which the convolutions `learning` learn, and all behind them that is cheap learns too; every
    convolution behind the first passes its gradient on by its `settings` (both by node)."""
    first = next((i for i, call in enumerate(graph.calls) if call.node in learning), len(graph.calls))
    layers: dict[str, tuple[Method, ...]] = {}
    learns: dict[str, tuple[str, ...]] = {}
    for call in graph.calls[first:]:
        if call.kind == "norm" and (roles := _roles(call, ("weight", "bias") if scales else ("bias",))):
            learns[call.name] = roles
        if call.kind == "conv":
            method = settings.get(call.node)
            if method is not None and method.refuse(call) is None:
                layers[call.name] = (method,)
            if call.node in learning:
                learns[call.name] = _roles(call, ("weight", "bias"))
    for call in graph.layers("linear"):
        learns[call.name] = _roles(call, ("weight", "bias"))
    return Plan(input_shape=graph.input_shape, layers=layers, learns=learns)


def _roles(call: Call, wanted: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(role for role in wanted if role in call.params)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
