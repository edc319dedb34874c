"""model, sample, Plan -> Timeline: when in a training step which bytes are there, by the calls of the graph.

Watched once, on meta tensors, it says what a step would hold if some of its calls ran again in backward (see
`edgetune.stretches`); what such a step really holds is then predicted by running it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from edgetune.contract import Plan, Segment
from edgetune.fold import pick
from edgetune.graph import Graph
from edgetune.hosts.segment import segment_behind
from edgetune.meter import Ledger
from edgetune.outcome import tensors_in
from edgetune.profile import hold_gradients, on_labels, shadowed
from edgetune.route import routed_graph

_NO_TURN = 2**62
"""Sequence numbers beyond are those of autograd's own nodes, which no call has made."""


@dataclass
class Value:
    """A storage of the forward pass: at which call it is made, up to which it is read, and the first that keeps it."""

    size: int
    made: int
    read: int
    kept: int | None = None


@dataclass
class Moment:
    """Bytes that are there when a call's turn begins, and at the most while it lasts."""

    start: int
    peak: int


@dataclass(frozen=True)
class Timeline:
    """`forward` and `backward` by the index of the call in `graph.calls`; the loss comes behind the last of them."""

    graph: Graph
    segments: tuple[Segment, ...]
    values: tuple[Value, ...]
    forward: Mapping[int, Moment]
    backward: Mapping[int, Moment]
    peak_bytes: int


def timeline(model: nn.Module, sample: torch.Tensor, plan: Plan, graph: Graph) -> Timeline | None:
    """Of a step of `model` by `plan`, in its micro-batches; None where the model runs no graph that can be followed.

    Raises as `edgetune.profile.profile` does.
    """
    with shadowed(model, sample, plan, graph) as (shadow, graph, x, device):
        flow = routed_graph(shadow)
        if flow is None:
            return None
        hold_gradients(shadow, held=x.shape[0] < sample.shape[0])
        clock = _Clock(device)
        with clock:
            with torch.autograd.graph.saved_tensors_hooks(clock.pack, lambda tensor: tensor):
                walk = _Walk(shadow, flow, _places(flow, graph), clock)
                out = walk.run(x)
                clock.turn(len(graph.calls))
                value = on_labels(None, F.cross_entropy)(out)
            del out, walk
            values = clock.settle()
            if value.requires_grad:
                value.backward()
        segments = tuple(s for node in flow.nodes if (s := segment_behind(node.target)) is not None)
        return Timeline(graph, segments, values, clock.moments[False], clock.moments[True], clock.peak_bytes)


def _places(flow: fx.Graph, graph: Graph) -> dict[fx.Node, int]:
    """Where in `graph.calls` a node stands; a segment where its last call does."""
    index, places = {call.node: at for at, call in enumerate(graph.calls)}, dict[fx.Node, int]()
    for node in flow.nodes:
        segment = segment_behind(node.target)
        if segment is not None:
            places[node] = max(index[call.node] for call in segment.calls)
        elif node.target is pick:
            places[node] = places[node.all_input_nodes[0]]
        elif node.name in index:
            places[node] = index[node.name]
    return places


class _Clock(Ledger):
    """A ledger that knows at which call a step is, in forward and in backward."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.moments: dict[bool, dict[int, Moment]] = {False: {}, True: {}}
        self._values: dict[int, Value] = {}
        self._done: list[Value] = []
        self._in_backward, self._at = False, 0
        self._marks: list[tuple[int, int]] = []

    def turn(self, at: int) -> None:
        """What follows belongs to the call of that index."""
        self._at = at
        self._marks.append((torch._C._autograd._get_sequence_nr(), at))
        self._moment()

    def reads(self, given: Any) -> None:
        """The call whose turn it is reads these."""
        for storage in self._known(given):
            self._values[storage].read = self._at

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """The hook that saved tensors go through."""
        for storage in self._known(tensor):
            value = self._values[storage]
            value.kept = self._at if value.kept is None else min(value.kept, self._at)
        return tensor

    def settle(self) -> tuple[Value, ...]:
        """After forward: what there was."""
        found = (*self._done, *self._values.values())
        self._values, self._in_backward = {}, True
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        if self._in_backward:
            node = torch._C._current_autograd_node()
            if node is not None and node._sequence_nr() < _NO_TURN:
                at = bisect_right(self._marks, node._sequence_nr(), key=lambda mark: mark[0]) - 1
                self._at = self._marks[max(at, 0)][1]
        self._moment()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _known(self, tree: Any) -> Iterator[int]:
        return (key for tensor in tensors_in(tree) if tensor.layout == torch.strided
                and (key := tensor.untyped_storage()._cdata) in self._values)

    def _moment(self) -> Moment:
        return self.moments[self._in_backward].setdefault(self._at, Moment(self.live_bytes, self.live_bytes))

    def _reached(self, size: int) -> None:
        super()._reached(size)
        moment = self._moment()
        moment.peak = max(moment.peak, size)

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        super()._allocated(storage)
        if not self._in_backward:
            self._values[storage._cdata] = Value(storage.nbytes(), self._at, self._at)

    def _freed(self, key: int) -> None:
        super()._freed(key)
        if (value := self._values.pop(key, None)) is not None:
            value.kept = None  # whoever wanted to keep it is gone already
            self._done.append(value)


class _Walk(fx.Interpreter):
    """Runs the graph node by node, with the clock."""

    def __init__(self, model: nn.Module, flow: fx.Graph, places: Mapping[fx.Node, int], clock: _Clock) -> None:
        super().__init__(model, graph=flow)
        self.places, self.clock = places, clock

    def run_node(self, n: fx.Node) -> Any:
        if n in self.places and n.op not in ("placeholder", "output"):
            self.clock.turn(self.places[n])
            self.clock.reads([self.env[source] for source in n.all_input_nodes])
        return super().run_node(n)
