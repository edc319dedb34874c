"""model, sample -> what each of its layers could gain, keep and take, by every method; and the best choice of all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from edgetune import kernels
from edgetune.apply import apply
from edgetune.calibrate import Calibration, calibrate, drawn_labels
from edgetune.contract import KeptMethod, Method, Plan
from edgetune.draft import draft, held_by, last_layers
from edgetune.errors import PlanError
from edgetune.graph import Call, trace
from edgetune.knapsack import Choice, best_choices, total_of
from edgetune.methods.backward.exact import Exact
from edgetune.profile import measured_ms, measured_peak, predicted_kept, predicted_peak
from edgetune.stopwatch import Laps, Progress, layer_times, samples_for

Picks = Sequence[int | None]
Added = dict[Method, dict[str, tuple[float, float, float]]]
"""What each convolution, with the calls up to the next, adds to a step beyond its forward pass: as the first that
learns, as one behind it, and where it only passes the gradient; milliseconds by method and node."""


@dataclass(frozen=True)
class Option:
    """One way to treat a convolution: by which of the planner's methods (its index), with which settings here, and
    whether the convolution learns or only passes the gradient on."""

    way: int
    method: Method
    learns: bool


@dataclass(frozen=True)
class Found:
    """A choice for every convolution, what it sums to (`ms` beyond a step in which only the head learns), its plan."""

    picked: Picks
    total: Choice
    made: Plan


class Prospect:
    """What does not change while budgets and micro-batches are tried.

    `methods` are those given, without what equals another one on this network. `options[i]` are those of convolution
    i: learning by each method that takes it, then only passing the gradient by each that does so in its own way. With
    `hold` what they keep is held by that, and methods of whole runs, which keep it in their own way, fall away.
    """

    def __init__(self, model: nn.Module, sample: torch.Tensor, methods: Sequence[Method], optimizer_copies: int,
                 batch: tuple[torch.Tensor, torch.Tensor] | None, progress: Progress | None,
                 hold: KeptMethod | None = None) -> None:
        self.model, self.sample, self.copies = model, sample, optimizer_copies
        self.progress, self.hold = progress, hold
        self._laps: dict[int, dict[Method, dict[str, Laps]]] = {}
        self._peaks: dict[tuple[str, str], int] = {}
        self._solved: dict[tuple[float | None, float | None, int, bool], Found] = {}
        self._choices: dict[tuple[int, bool], list[list[Choice]]] = {}
        self.graph = trace(model, sample[:1]).model_copy(update={"input_shape": tuple(sample.shape)})
        self.convs = self.graph.layers("conv")
        self.kept: dict[Method, dict[str, tuple[int, int]]] = {}
        self.methods = self._differing([m for m in methods if hold is None or not self._takes_runs(m)])
        batch = batch or (sample, drawn_labels(model, sample))
        self.worth: Calibration = calibrate(model, self.graph, batch, self.methods, hold=hold)
        self.faith = {method: _faith(*(_squared([cosines.get(call.name, other) for call in self.convs])
                                       for cosines, other in ((gauge.fidelity, 0.0), (gauge.alone, 1.0))))
                      for method, gauge in self.worth.gauges.items()}
        self.options = [self._options_of(call) for call in self.convs]
        self.head = draft(self.graph, {}, frozenset())

    def _held(self, made: Plan) -> Plan:
        return held_by(made, self.graph, self.hold)

    def _takes_runs(self, method: Method) -> bool:
        """Whether on this network the method takes calls together, and keeps what they read in its own way."""
        return bool(method.claim(self.graph, last_layers(self.graph, None, method)))

    def _differing(self, methods: Sequence[Method]) -> tuple[Method, ...]:
        """The methods, without those that are exact on this network and keep what a simpler one does."""
        taken: list[Method] = []
        for method in dict.fromkeys(methods):
            self.kept[method] = self._kept(self._held(last_layers(self.graph, None, method)))
            plain = [other for other in (method, *taken) if other.exact_on(self.graph) and not other.learns_as]
            if method not in plain or all(self.kept[method] != self.kept[other] for other in plain[1:]):
                taken.append(method)
        if not any(isinstance(method, Exact) for method in taken):
            raise PlanError("the planner weighs methods against exact gradients: give Exact() among its `methods`")
        return tuple(taken)

    def _options_of(self, call: Call) -> tuple[Option, ...]:
        taking = [(way, method) for way, method in enumerate(self.methods) if method.refuse(call) is None]
        learning = [Option(way, self.worth.gauges[method].own.get(call.name, method), True) for way, method in taking]
        # what is exact but for the part that learns passes on as the exact method does
        passing = [Option(way, method, False) for way, method in taking
                   if not (method.learns_as and method.exact_on(self.graph))]
        return (*learning, *passing)

    def pick_of(self, index: int, way: int, learns: bool) -> int:
        """The option of convolution `index` by one of the methods, or, where it has none, by the first."""
        at = {(option.way, option.learns): pick for pick, option in enumerate(self.options[index])}
        return at.get((way, learns), at[0, learns])

    def laps(self, micro: int) -> tuple[int, dict[Method, dict[str, Laps]]]:
        """Samples that were timed, a micro-batch if that is quick enough; laps of every call by every method."""
        samples = samples_for(self.graph, micro)
        if samples not in self._laps:
            whole = {method: self._held(last_layers(self.graph, None, method)) for method in self.methods}
            self._laps[samples] = layer_times(self.model, self.graph, whole, samples, progress=self.progress,
                                              channels_last=kernels.is_channels_last(self.sample))
        return samples, self._laps[samples]

    @cached_property
    def most_gain(self) -> float:
        """What learning everything exactly gains."""
        return sum(self.worth.importance.get(call.name, 0.0) for call in self.convs)

    def solve(self, capacity_bytes: float | None, capacity_ms: float | None, micro: int, timed: bool = False) -> Found:
        """The best choice of every layer under both capacities (None: no limit), beyond what the head takes.

        `timed`: tell its time even where that has no limit.
        """
        timed = timed or capacity_ms is not None
        key = (capacity_bytes, capacity_ms, micro, timed)
        if key not in self._solved:
            choices = self.choices(micro, timed)
            _, picked = best_choices(choices, capacity_bytes, capacity_ms)
            self._solved[key] = self.found(choices, picked, micro)
        return self._solved[key]

    def nothing(self, micro: int) -> Found:
        """Only the head learns."""
        return Found([None] * len(self.convs), Choice(0, 0.0, learns=False), self.in_parts(self.head, micro))

    def found(self, choices: Sequence[Sequence[Choice]], picked: Picks, micro: int) -> Found:
        """What `picked` sums to, and its plan."""
        taken = {call.node: options[pick] for call, options, pick in zip(self.convs, self.options, picked, strict=True)
                 if pick is not None}
        settings = {node: option.method for node, option in taken.items()}
        learning = {node for node, option in taken.items() if option.learns}
        made = self._held(draft(self.graph, settings, frozenset(learning)))
        return Found(picked, total_of(choices, picked), self.in_parts(made, micro))

    def timed(self, found: Found) -> Found:
        """The same choice, with its time."""
        micro = found.made.micro_batch or len(self.sample)
        return self.found(self.choices(micro, timed=True), found.picked, micro)

    def choices(self, micro: int, timed: bool) -> list[list[Choice]]:
        """The choices of every convolution, input to output; with times of a whole step where `timed`."""
        if (micro, timed) not in self._choices:
            added = self._added_ms(micro) if timed else None
            self._choices[micro, timed] = [self._choices_of(index, micro, added) for index in range(len(self.convs))]
        return self._choices[micro, timed]

    def _choices_of(self, index: int, micro: int, added: Added | None) -> list[Choice]:
        call, choices = self.convs[index], list[Choice]()
        for option in self.options[index]:
            method = self.methods[option.way]
            own, after = self.kept[method][call.node]
            passes = self.faith[method][index][1]
            first, inner, through = (0.0, 0.0, 0.0) if added is None else added[method][call.node]
            if option.learns:
                worth = self.worth.importance.get(call.name, 0.0) * self.fidelity(option.way, index)
                choices.append(Choice((own + after) * micro + self._state_bytes(call, option.method), worth, passes,
                                      ms=inner, first_ms=first))
            else:
                choices.append(Choice(after * micro, 0.0, passes, learns=False, ms=through))
        return choices

    def fidelity(self, way: int, index: int) -> float:
        """What a method gains of learning a convolution exactly: 0 to 1."""
        method = self.methods[way]
        return self.faith[method][index][0] * self.worth.gauges[method].share.get(self.convs[index].name, 1.0)

    def _state_bytes(self, call: Call, method: Method) -> int:
        """Gradients and optimizer state of what learns."""
        numbers = math.prod(call.param_shapes.get("bias", (0,)))
        if call.geometry is not None:
            whole = torch.empty(call.param_shapes["weight"], device="meta")
            numbers += method.part(whole, call.geometry).numel()
        return 4 * (1 + self.copies) * numbers

    def _added_ms(self, micro: int) -> Added:
        samples, laps = self.laps(micro)
        scale = len(self.sample) / samples
        added: Added = {}
        for method, own in laps.items():
            passing = self._by_conv({node: lap.passing_ms - lap.frozen_ms for node, lap in own.items()})
            learning = {node: lap.learning_ms - lap.passing_ms for node, lap in own.items()}
            added[method] = {}
            for node, (conv, after) in passing.items():
                through, weight = max(conv + after, 0.0), max(learning.get(node, 0.0), 0.0)
                inner = through + weight
                added[method][node] = (scale * min(max(after, 0.0) + weight, inner), scale * inner, scale * through)
        return added

    def _by_conv(self, values: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Values of calls (by node), gathered by convolution: its own, and those of the calls up to the next one."""
        shares: dict[str, tuple[float, float]] = {}
        current: str | None = None
        for call in self.graph.calls:
            value = values.get(call.node, 0.0)
            if call.kind == "conv":
                current = call.node
                shares[current] = (value, 0.0)
            elif current is not None and call.kind != "linear":
                shares[current] = (shares[current][0], shares[current][1] + value)
        return shares

    def _kept(self, made: Plan) -> dict[str, tuple[int, int]]:
        """Bytes that one sample keeps at each convolution: (its own, those of the calls up to the next one)."""
        by_name = predicted_kept(self.model, self.sample[:1], made, self.graph)
        calls = {name: sum(call.name == name for call in self.graph.calls) for name in by_name}
        shares = self._by_conv({call.node: -(-by_name.get(call.name, 0) // max(calls.get(call.name, 1), 1))
                                for call in self.graph.calls})
        return {node: (int(own), int(after)) for node, (own, after) in shares.items()}

    def predicted_peak(self, made: Plan, micro: int) -> int:
        """Training memory of a plan at its peak, bytes."""
        made = self.in_parts(made, micro)
        return self._once("predicted", made, lambda: predicted_peak(
            self.model, self.sample, made, self.graph, optimizer_copies=self.copies))

    def measured_peak(self, made: Plan) -> int:
        """The same by a real step."""
        return self._once("measured", made, lambda: measured_peak(
            self._applied(made), self.sample, optimizer_copies=self.copies, micro_batch=made.micro_batch))

    def _once(self, origin: str, made: Plan, peak: Callable[[], int]) -> int:
        key = origin, made.model_dump_json()
        if key not in self._peaks:
            self._peaks[key] = peak()
        return self._peaks[key]

    def measured_ms(self, made: Plan) -> float:
        """How long a real step takes."""
        return measured_ms(self._applied(made), self.sample, micro_batch=made.micro_batch)

    def in_parts(self, made: Plan, micro: int) -> Plan:
        """The plan, `micro` samples at a time."""
        return made.model_copy(update={"micro_batch": None if micro >= len(self.sample) else micro})

    def _applied(self, made: Plan) -> nn.Module:
        twin = copy.deepcopy(self.model)
        apply(twin, made, self.graph)
        return twin


def _squared(cosines: list[float]) -> list[float]:
    """A gradient of cosine c to the exact one lets the loss fall by c squared of what the exact one does."""
    return [max(cosine, 0.0) ** 2 for cosine in cosines]


def _faith(together: list[float], alone: list[float]) -> list[tuple[float, float]]:
    """For each layer, input to output: what share its own weight gradient gains, and which share of faith it passes on.

    `together` are the shares of a whole network on one method, `alone` those of each layer where all others are exact:
    their ratio is what comes to a layer through all behind it.
    """
    comes, faith = 1.0, list[tuple[float, float]]()
    for index in range(len(together) - 1, -1, -1):
        before = min(_ratio(together[index - 1], alone[index - 1]), comes) if index else 0.0
        faith.append((alone[index], _ratio(before, comes)))
        comes = before
    return faith[::-1]


def _ratio(part: float, whole: float) -> float:
    return min(part / whole, 1.0) if whole > 0 else 0.0
