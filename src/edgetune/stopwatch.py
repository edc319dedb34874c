"""model, Graph, plans -> how long each layer takes by each method on this machine, measured once and remembered.

The segments that a plan makes run alone, forward and backward, through the very rules that train; the time of a
segment of several calls is split at the moments at which its host goes on to the next call. Layers of one geometry are
timed once. What was found stands in a file of the user's cache folder, one a machine, number of threads, versions of
edgetune and torch, and kernel library; a damaged file is measured anew, and one that cannot be written is only not
remembered.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from pydantic import Field
from torch import nn

from edgetune.apply import prepared
from edgetune.claims import claim
from edgetune.contract import Method, Needs, Plan, Segment
from edgetune.errors import RunError
from edgetune.graph import Call, Graph
from edgetune.hosts.cursor import watched_by, working_on
from edgetune.kernels import build
from edgetune.methods.backward.exact import Exact
from edgetune.record import Frozen, Record

MOST_MACS = 8e9
"""Forward multiply-accumulates of the samples that layers are timed on, at most: larger batches are scaled up to."""
ROUNDS, TURN_MS = 5, 200.0
"""A segment is run so many times, or, where that takes longer than TURN_MS, less often, but twice."""
PATIENCE_S = 40.0
"""After so many seconds what is left is run once only."""

Progress = Callable[[str], None]
Milliseconds = Field(ge=0, allow_inf_nan=False)


class Laps(Frozen):
    """Milliseconds of one call, forward and backward: `frozen_ms` without backward, `passing_ms` where the gradient
    only passes, `learning_ms` where its weight learns too."""

    frozen_ms: float = Milliseconds
    passing_ms: float = Milliseconds
    learning_ms: float = Milliseconds


class Times(Record):
    """What is remembered of one machine: laps by the call's facts."""

    laps: dict[str, Laps] = {}


def samples_for(graph: Graph, micro_batch: int) -> int:
    """How many samples layers are timed on: the micro-batch, halved until a pass is quick enough; `graph` is of one."""
    samples = micro_batch
    while samples > 1 and samples * graph.macs > MOST_MACS:
        samples //= 2
    return samples


def layer_times(model: nn.Module, graph: Graph, plans: Mapping[Method, Plan], samples: int, *,
                channels_last: bool = False, progress: Progress | None = None) -> dict[Method, dict[str, Laps]]:
    """Laps of every call (by node) that a segment holds, for each method by its whole-network plan.

    Calls without a segment run as they are in every plan, and are left out. The model stays as it is; `progress` hears
    a sentence when something has to be measured. Times are of `samples` samples.
    """
    place = next(model.parameters(), torch.zeros(()))
    shops = {}
    for method, made in plans.items():
        with prepared(model, graph, made) as known_graph:
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            shops[method] = _Shop(tensors, known_graph, samples, channels_last, place.device, place.dtype)
    keys = {method: _keys(shops[method], method, made) for method, made in plans.items()}
    known = _remembered(_file(place.device))
    missing = {key for own in keys.values() for _, calls in own for key in calls.values()} - set(known)
    if missing:
        if progress is not None:
            progress(f"timing {len(missing)} kinds of layer on this machine: that is remembered")
        found = _measure(shops, keys, plans, missing)
        known = {**known, **found}
        _remember(_file(place.device), found)
    return {method: {node: known[key] for _, calls in own for node, key in calls.items()}
            for method, own in keys.items()}


Keyed = list[tuple[Segment, dict[str, str]]]
"""Segments, each with the keys of its calls by node."""


@dataclass(frozen=True)
class _Shop:
    """What segments are run with: the model's tensors, and samples drawn at random."""

    tensors: Mapping[str, torch.Tensor]
    graph: Graph
    samples: int
    channels_last: bool
    device: torch.device
    dtype: torch.dtype

    def draw(self, shape: Sequence[int]) -> torch.Tensor:
        """A random value of that shape, for `samples` samples."""
        x = torch.randn((self.samples, *shape[1:]), device=self.device, dtype=self.dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x


def _keys(shop: _Shop, method: Method, made: Plan) -> Keyed:
    keyed = []
    for segment in claim(shop.graph, made):
        calls = {}
        run = next((made.layers[call.name] for call in segment.calls if call.name in made.layers), (method,))
        for call in segment.calls:
            stack = run if len(segment.calls) > 1 else made.layers.get(call.name, (Exact(),))
            ways = (f"{own.method} {own.model_dump_json()}" for own in stack)
            facts = call.model_dump_json(include={"kind", "function", "geometry", "attributes", "in_shapes"})
            calls[call.node] = " ".join((*ways, type(segment.rule).__name__, facts,
                                         ",".join(made.learns.get(call.name, ())), str(shop.dtype),
                                         f"{shop.samples} samples", "channels last" if shop.channels_last else ""))
        keyed.append((segment, calls))
    return keyed


def _measure(shops: Mapping[Method, _Shop], keys: Mapping[Method, Keyed], plans: Mapping[Method, Plan],
             missing: set[str]) -> dict[str, Laps]:
    """Run every segment that has something new in it; calls of one kind share the median of what they took."""
    began, found = time.monotonic(), dict[str, list[Laps]]()
    with torch.random.fork_rng():
        for method, own in keys.items():
            for segment, calls in own:
                if (missing & set(calls.values())) - set(found):
                    rounds = ROUNDS if time.monotonic() - began < PATIENCE_S else 1
                    for node, laps in _run(shops[method], segment, plans[method].learned(), rounds).items():
                        found.setdefault(calls[node], []).append(laps)
    return {key: Laps(**{name: statistics.median(getattr(laps, name) for laps in several)
                         for name in Laps.model_fields}) for key, several in found.items()}


def _run(shop: _Shop, segment: Segment, learned: frozenset[str], rounds: int) -> dict[str, Laps]:
    """The quickest of some rounds, call by call: what disturbs a round only ever adds to it."""
    shapes, first = {call.node: call.out_shape for call in shop.graph.calls}, segment.calls[0]
    xs = [shop.draw(shapes[node] if first.inputs else first.in_shapes[0]) for node in segment.inputs]
    gys = [shop.draw(shapes[node]) for node in segment.outputs]
    params = {name: shop.tensors[name].detach() for name in (*segment.params, *segment.state)}
    weights = {name for call in segment.calls if call.kind == "conv" for name in call.params.values()}
    passes = tuple(True for _ in xs)
    modes = {"frozen_ms": Needs(tuple(False for _ in xs), frozenset()),
             "passing_ms": Needs(passes, learned & set(segment.params) - weights),
             "learning_ms": Needs(passes, learned & set(segment.params))}
    best: dict[str, dict[str, float]] = {mode: {} for mode in modes}
    began = time.perf_counter()
    for number in range(rounds + 1):
        if number > 2 and 1e3 * (time.perf_counter() - began) > len(modes) * TURN_MS:
            break
        for mode, needs in modes.items():
            lap = _Lap(shop.device)
            with torch.no_grad(), watched_by(lap):
                _once(segment, xs, gys, params, needs)
                lap(None)
            for node, ms in lap.ms.items() if number or rounds == 1 else ():  # the first round warms up
                best[mode][node] = min(best[mode].get(node, ms), ms)
    return {call.node: Laps(**{mode: best[mode].get(call.node, 0.0) for mode in modes}) for call in segment.calls}


def _once(segment: Segment, xs: Sequence[torch.Tensor], gys: Sequence[torch.Tensor],
          params: Mapping[str, torch.Tensor], needs: Needs) -> None:
    working_on(segment.calls[0])
    _, kept = segment.rule.forward(segment, xs, params, needs)
    if any(needs.inputs):
        working_on(segment.calls[-1])
        segment.rule.backward(segment, kept, gys, params, needs)


@dataclass
class _Lap:
    """Adds the time since it was last called to the call named then."""

    device: torch.device
    ms: dict[str, float] = field(default_factory=dict)
    _node: str | None = None
    _since: float = 0.0

    def __call__(self, call: Call | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._node is not None:
            self.ms[self._node] = self.ms.get(self._node, 0.0) + 1e3 * (now - self._since)
        self._node, self._since = None if call is None else call.node, now


def _file(device: torch.device) -> Path:
    """The file of this machine as it is now."""
    status = build.status()
    library = Path(status.path).name if status.path is not None else "torch alone"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = (metadata.version("edgetune"), str(torch.__version__))
    facts = repr((build.cpu(), torch.get_num_threads(), versions, library, where))
    return build.cache_folder() / f"times-{hashlib.sha256(facts.encode()).hexdigest()[:20]}.json"


def _remembered(file: Path) -> dict[str, Laps]:
    """What the file holds; nothing where it is missing or damaged."""
    with suppress(RunError):
        return Times.load(file).laps
    return {}


def _remember(file: Path, found: Mapping[str, Laps]) -> None:
    """Add to the file, which is replaced whole. Of two processes that write at once the later one may lose what the
    other found meanwhile: that is then measured again."""
    with suppress(RunError):
        Times(laps={**_remembered(file), **found}).save(file)

