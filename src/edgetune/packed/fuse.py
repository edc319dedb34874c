"""Graph -> the steps of the packed network: what goes together, and which values are needed as bits.

A run from a binary layer to the layers that read its answer's signs, with nothing but monotone functions of one value
between them, is one step from bits to bits: thresholds. What else happens value by value (norm, residual, activation)
is one step on maps. Dropout and identity disappear. What no step can do is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from edgetune.contract import ArithmeticMethod
from edgetune.errors import Refusal
from edgetune.graph import Call, Graph
from edgetune.hosts.binary import BinaryMethod
from edgetune.packed.layers import BITS, INPUT
from edgetune.quantize.fuse import refuse_unfollowed
from edgetune.recognise import ARITHMETIC, MASKS

_ALONE = ("conv", "linear", "max_pool", "mean", "flatten", "subsample", "pad", "scale", "activation", ARITHMETIC)
"""Kinds of calls that may be steps of their own."""
_POINTWISE = ("norm", "add", "activation")
"""Kinds of calls that go into one step, in this order; of activations those that keep values between bounds."""
_VANISHES = ("dropout", "identity")


@dataclass(frozen=True)
class Step:
    """One step: `calls` in order, the values it reads, and whether its answer is a map, bits, or both. Without calls it
    takes the signs of what it reads, a map of so many `channels`."""

    name: str
    calls: tuple[Call, ...]
    sources: tuple[str, ...]
    channels: int
    map: bool = True
    bits: bool = False


def fuse(graph: Graph, methods: Mapping[str, ArithmeticMethod]) -> tuple[Step, ...]:
    """The steps in order; `methods` has those of arithmetic layers by name. Raises Refusal naming the first call that
    has no step."""
    for call in graph.calls:
        _refuse(graph, call, methods)
    binary = {name: method for name, method in methods.items() if isinstance(method, BinaryMethod)}
    readings = Readings(_without(graph, _VANISHES), binary)
    graph = readings.graph
    runs = {run[0].node: run for run in map(readings.run_of, graph.layers(ARITHMETIC)) if run}
    taken = {call.node for run in runs.values() for call in run[1:]}
    together: dict[str, tuple[Call, ...]] = {}
    for call in reversed(graph.layers(*_POINTWISE)):
        if call.node not in taken and (call.kind != "activation" or call.function in MASKS):
            together[call.node] = readings.together_with(call)
            taken |= {each.node for each in together[call.node]}
    line = _Line(readings)
    for call in graph.calls:
        if call.kind == "input":
            line.value(call)
        elif call.node in runs:
            line.run(runs[call.node])
        elif call.node in together:
            line.pointwise(together[call.node])
        elif call.kind in _ALONE and call.node not in taken:
            line.alone(call)
    _check_ends(graph, line.steps)
    return tuple(line.steps)


@dataclass(frozen=True)
class Readings:
    """Who reads what of a graph: values, or their signs only."""

    graph: Graph
    binary: Mapping[str, BinaryMethod]

    def reads_bits(self, call: Call) -> bool:
        """Whether a call is a layer that reads signs."""
        return call.name in self.binary and self.binary[call.name].activations

    def reads_map(self, call: Call) -> bool:
        """Whether a call needs more of what it reads than signs."""
        return not self.reads_bits(call) or not self.binary[call.name].keeps_bits

    def needs_map(self, call: Call) -> bool:
        """Whether anyone reads more of a value than its signs."""
        return any(self.reads_map(self.graph[node]) for node in call.consumers)

    def needs_signs(self, call: Call) -> bool:
        """Whether anyone reads the signs of a value."""
        return any(self.reads_bits(self.graph[node]) for node in call.consumers)

    def run_of(self, call: Call) -> tuple[Call, ...] | None:
        """From a layer of bits to the value whose signs alone are read, or None where that cannot be thresholds."""
        if self.reads_map(call):
            return None
        run = [call]
        while self.needs_map(run[-1]) or not self.needs_signs(run[-1]):
            reader = self.graph[run[-1].consumers[0]] if len(run[-1].consumers) == 1 else None
            if reader is None or not (reader.kind in ("norm", "max_pool") or reader.function in MASKS):
                return None
            run.append(reader)
        pools = [place for place, each in enumerate(run) if each.kind == "max_pool"]
        return tuple(run) if pools in ([], [1], [len(run) - 1]) else None

    def together_with(self, last: Call) -> tuple[Call, ...]:
        """What is computed value by value up to `last`, and read by nobody else on the way."""
        calls = [last]
        while (before := self._before(calls[0])) is not None:
            calls.insert(0, before)
        return tuple(calls)

    def _before(self, call: Call) -> Call | None:
        earlier = _POINTWISE[:_POINTWISE.index(call.kind)]
        sources = (self.graph[node] for node in call.inputs)
        return next((source for source in sources if source.kind in earlier and len(source.consumers) == 1), None)


@dataclass
class _Line:
    """The steps so far, what values are called, and which of them there are as bits."""

    readings: Readings
    steps: list[Step] = field(default_factory=list)
    maps: dict[str, str] = field(default_factory=dict)
    bits: dict[str, str] = field(default_factory=dict)

    def value(self, call: Call) -> None:
        """The picture."""
        self.maps[call.node] = INPUT
        self._signs(call)

    def run(self, run: tuple[Call, ...]) -> None:
        """From bits to bits, called like the convolution or, where there is one, the pool behind it."""
        first, last = run[0], run[-1]
        name = next((call.node for call in run if call.kind == "max_pool"), first.node)
        self._put(Step(name, run, self._sources(first), _channels(last), map=False, bits=True), last.node)

    def pointwise(self, calls: tuple[Call, ...]) -> None:
        """What is computed value by value, called like its last call."""
        inside, last = {call.node for call in calls}, calls[-1]
        sources = tuple(self.maps[node] for call in calls for node in call.inputs if node not in inside)
        signs = self.readings.needs_signs(last)
        whole = self.readings.needs_map(last) or not signs
        self._put(Step(last.node, calls, sources, _channels(last), whole, signs))

    def alone(self, call: Call) -> None:
        """A call by itself."""
        self._put(Step(call.node, (call,), self._sources(call), _channels(call)))
        self._signs(call)

    def _signs(self, call: Call) -> None:
        if self.readings.needs_signs(call):
            sources = (self.maps[call.node],)
            self._put(Step(f"{call.node}.signs", (), sources, _channels(call), map=False, bits=True), call.node)

    def _put(self, step: Step, node: str | None = None) -> None:
        self.steps.append(step)
        if step.map:
            self.maps[step.name] = step.name
        if step.bits:
            self.bits[node or step.name] = step.name + BITS

    def _sources(self, call: Call) -> tuple[str, ...]:
        """The values that a call reads, bits first."""
        if not self.readings.reads_bits(call):
            return tuple(self.maps[node] for node in call.inputs)
        (node,) = call.inputs
        return (self.bits[node], *([self.maps[node]] if self.readings.reads_map(call) else []))


def _channels(call: Call) -> int:
    return call.out_shape[1]


def _without(graph: Graph, kinds: Collection[str]) -> Graph:
    """The graph in which calls of these kinds are skipped: who read them reads what they read."""
    stands_for: dict[str, str] = {}
    kept: list[Call] = []
    for call in graph.calls:
        inputs = tuple(stands_for.get(node, node) for node in call.inputs)
        if call.kind in kinds:
            stands_for[call.node] = inputs[0]
        else:
            kept.append(call.model_copy(update={"inputs": inputs}))
    readers = {call.node: tuple(each.node for each in kept if call.node in each.inputs) for call in kept}
    return graph.model_copy(update={"calls": tuple(
        call.model_copy(update={"consumers": readers[call.node]}) for call in kept)})


def _refuse(graph: Graph, call: Call, methods: Mapping[str, ArithmeticMethod]) -> None:
    way_out = "replace the layer, or run the network as it was trained"
    refuse_unfollowed(graph, call)
    if call.kind == ARITHMETIC and (reason := methods[call.name].unpacked()) is not None:
        head, _, other = reason.partition(": ")
        raise Refusal(call.name, f"computes by {call.function}, which {head}", other or way_out)
    if call.kind not in (*_ALONE, *_POINTWISE, *_VANISHES, "input", "output"):
        raise Refusal(call.name, f"is a {call.function}, which has no step in a packed network", way_out)
    if call.kind == "flatten" and (len(call.inputs) != 1 or len(call.out_shape) != 2):
        raise Refusal(call.name, f"makes {call.out_shape} of {call.in_shapes[0]}", "flatten what belongs to one "
                      "picture into one axis, `torch.flatten(x, 1)`")
    if call.kind == "linear" and len(call.in_shapes[0]) != 2:
        raise Refusal(call.name, f"reads {call.in_shapes[0]}", "flatten in front of it, `torch.flatten(x, 1)`")


def _check_ends(graph: Graph, steps: list[Step]) -> None:
    inputs = graph.layers("input")
    results = [node for call in graph.layers("output") for node in call.inputs]
    if len(inputs) != 1 or len(results) != 1 or not steps or steps[-1].name != results[0]:
        raise Refusal(steps[-1].name if steps else "", "is not the way from one picture to one result",
                      "give a network with one input, one output and nothing computed beside")
