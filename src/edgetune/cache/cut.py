"""Finding where the frozen part of a network ends, and running both sides of the cut on their own.

The network runs once as it trains, call by call. The frozen part is the longest run of first calls that do not
learn, draw no random numbers, change no state and carry no hooks; it is cut where one value crosses, or several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgetune.errors import Refusal
from edgetune.fold import compiled
from edgetune.graph import carries_hooks, follow, rerouted
from edgetune.meter import PRODUCTS
from edgetune.route import routed_graph

PROBES = 5
"""Samples of a trial run; no usual number, so that a first axis of that length is the batch."""
SHARE = 0.5
"""The cut where a single value crosses is taken if it has at least this share of the frozen multiply-accumulates in
front of it; else the latest cut, with all the values that cross."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Value:
    """A tensor that crosses the cut: its node, the shape of a sample, how it is laid out."""

    node: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool


@dataclass(frozen=True)
class Cut:
    """A network in two parts, as functions: `prefix(model, x) -> values` and `suffix(model, *values) -> output`.

    `layers` are those that the values come from, `held` the names of all tensors that the prefix reads, `code` what
    it does.
    """

    values: tuple[Value, ...]
    layers: tuple[str, ...]
    held: tuple[str, ...]
    code: str
    prefix: Callable[..., tuple[torch.Tensor, ...]]
    suffix: Callable[..., torch.Tensor]


def find_cut(model: nn.Module, shape: Sequence[int], share: float = SHARE) -> Cut:
    """Cut `model`, with its plan applied, for samples of `shape` (c h w) and for the mode that it is in.

    In training it runs as planned and with gradients, in evaluation by its own forward. With a `share` of 0 the cut
    is where a single value crosses, however little lies in front of it.

    Raises Refusal, naming the layer, where there is nothing in front of the cut that is worth keeping.
    """
    graph = _graph(model)
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x, other = (torch.randn((PROBES, *shape), generator=generator).to(first) for _ in range(2))
    with _left_as_found(model, first.device):
        scout = _Scout(model, graph)
        scout.explore(x)
        position = _position(scout, share)
        cut = _cut(model, scout, position)
        _check_samples_apart(model, cut, x, other)
    return cut


def _graph(model: nn.Module) -> fx.Graph:
    if carries_hooks(model):
        raise Refusal(type(model).__name__, "carries hooks, which would not see what is cached",
                      "remove them, or train without a cache")
    routed = routed_graph(model)
    if routed is not None and model.training:
        return routed
    strange = routed is None and "forward" in model.__dict__ and rerouted(model) is None
    graph, reasons = (None, {"": "its forward was replaced"}) if strange else follow(model)
    if graph is None:
        raise Refusal(type(model).__name__, f"cannot be followed ({reasons['']})", "train it without a cache")
    return graph


@dataclass(frozen=True)
class _Seen:
    """What a node gave in the trial run; `value` is None where that could not be kept."""

    node: fx.Node
    value: Value | None
    storage: int
    macs: int


class _Scout(fx.Interpreter):
    """Runs the first calls of a network up to the one that ends the frozen part; `end` says why it does."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.model, self.flow = model, graph
        self.seen: list[_Seen] = []
        self.end, self.end_name = "gives the answer", ""

    def explore(self, x: torch.Tensor) -> None:
        with torch.enable_grad(), suppress(_End):
            self.run(x)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            raise _End
        before, states = _random_state(self.model), _versions(self.model)
        if n.op == "call_module" and any(map(carries_hooks, self.model.get_submodule(str(n.target)).modules())):
            self._stop(n, "carries hooks")
        with _Macs() as macs:
            out = super().run_node(n)
        if n.op != "get_attr":
            if any(t.requires_grad for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
                self._stop(n, "learns")
            if not torch.equal(before, _random_state(self.model)):
                self._stop(n, "draws random numbers")
            if states != _versions(self.model):
                self._stop(n, "changes its own state")
        storage = out.untyped_storage().data_ptr() if isinstance(out, torch.Tensor) else 0
        self.seen.append(_Seen(n, _value(n, out), storage, macs.total))
        return out

    def _stop(self, n: fx.Node, why: str) -> None:
        self.end, self.end_name = why, _layer(self.model, n)
        raise _End


class _End(Exception):
    """The frozen part ends here."""


class _Macs(TorchDispatchMode):
    """Counts multiply-accumulates."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS:
            self.total += PRODUCTS[func](args, out)
        return out


def _value(node: fx.Node, out: Any) -> Value | None:
    """How what a node gave would be kept; None unless it is a tensor of real numbers, sample by sample."""
    if not isinstance(out, torch.Tensor) or out.dtype not in FLOATS or out.shape[:1] != (PROBES,):
        return None
    last = out.dim() == 4 and not out.is_contiguous() and out.is_contiguous(memory_format=torch.channels_last)
    return Value(node.name, tuple(out.shape[1:]), out.dtype, last)


def _position(scout: _Scout, share: float) -> int:
    """In front of how many nodes the cut is. Raises Refusal where nothing is gained."""
    done, best, single = 0, (0, 0), (0, 0)
    for position, entry in enumerate(scout.seen, start=1):
        done += entry.macs
        values = _crossing(scout, position)
        if not values or any(entry.value is None for entry in values):
            continue
        if len({entry.storage for entry in values}) < len(values):  # a change of one would be a change of the other
            continue
        best = (done, position)
        if len(values) == 1:
            single = (done, position)
    macs, position = single if single[0] >= share * best[0] else best
    if macs == 0:
        raise Refusal(scout.end_name, f"{scout.end}, and nothing worth keeping lies in front of it",
                      "let fewer layers learn, or train without a cache")
    return position


def _crossing(scout: _Scout, position: int) -> list[_Seen]:
    """The values made by the first nodes that later ones read; parameters are read anew on both sides."""
    front = {entry.node for entry in scout.seen[:position]}
    return [entry for entry in scout.seen[:position]
            if entry.node.op != "get_attr" and any(user not in front for user in entry.node.users)]


def _cut(model: nn.Module, scout: _Scout, position: int) -> Cut:
    crossing = _crossing(scout, position)
    nodes = [node for node in scout.flow.nodes if node.op != "get_attr"]
    front_nodes = {entry.node for entry in scout.seen[:position]}
    ends = [entry.node for entry in crossing]
    front = fx.Graph()
    copy_nodes(front, [n for n in nodes if n in front_nodes], {}, ends)
    back = fx.Graph()
    inputs = {end: back.placeholder(end.name) for end in ends}
    copy_nodes(back, [n for n in nodes if n not in front_nodes], inputs, None)
    values = tuple(entry.value for entry in crossing if entry.value is not None)
    modules = [str(n.target) for n in front.nodes if n.op == "call_module"]
    code = front.python_code("self").src + "".join(f"{name}: {model.get_submodule(name)}\n" for name in modules)
    return Cut(values=values, layers=tuple(_layer(model, end) for end in ends),
               held=tuple(sorted(tensors_read(model, front.nodes))), code=code, prefix=compiled(model, front),
               suffix=compiled(model, back))


def tensors_read(model: nn.Module, nodes: Iterable[fx.Node]) -> set[str]:
    """The qualified names of all tensors that nodes of a graph of `model` are, or read in their calls."""
    nodes = list(nodes)
    names = {str(node.target) for node in nodes if node.op == "get_attr"}
    modules = {str(node.target) for node in nodes if node.op == "call_module"}
    return names | {f"{name}.{inner}" for name in modules for inner in _state(model.get_submodule(name))}


def copy_nodes(into: fx.Graph, nodes: list[fx.Node], made: dict[fx.Node, fx.Node],
               ends: list[fx.Node] | None) -> None:
    """Copy nodes, and what they read of the model; `ends` become the output."""
    made = dict(made)

    def fetch(node: fx.Node) -> fx.Node:
        if node not in made:
            made[node] = into.node_copy(node)
        return made[node]

    for node in nodes:
        made[node] = into.node_copy(node, fetch)
    if ends is not None:
        into.output(tuple(made[end] for end in ends))
    into.lint()


def _check_samples_apart(model: nn.Module, cut: Cut, x: torch.Tensor, other: torch.Tensor) -> None:
    """Refuse a prefix in which what a sample gives depends on those beside it."""
    mixed = torch.cat([x[:1], other[1:]])
    with torch.set_grad_enabled(model.training):
        for ours, theirs, layer in zip(cut.prefix(model, x), cut.prefix(model, mixed), cut.layers, strict=True):
            if not torch.allclose(ours[0], theirs[0], rtol=0, atol=0, equal_nan=True):
                raise Refusal(layer, "depends on the other pictures of a batch, so that nothing can be kept of one",
                              "train without a cache")


def _state(module: nn.Module) -> Iterator[str]:
    yield from (name for name, _ in module.named_parameters())
    yield from (name for name, _ in module.named_buffers())


def _layer(model: nn.Module, node: fx.Node) -> str:
    """The layer a node belongs to, as a person knows it: by its module, what it learns, or the node's own name."""
    if node.op == "call_module":
        return str(node.target)
    read = [str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"]
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    names = [name for name in read if name in learned] or read[:1]
    return names[0].rpartition(".")[0] if names else node.name


def _random_state(model: nn.Module) -> torch.Tensor:
    device = next(model.parameters()).device
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states)


def _versions(model: nn.Module) -> list[int]:
    return [tensor._version for tensor in (*model.parameters(), *model.buffers())]


@contextmanager
def _left_as_found(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Take back what a trial run does to random numbers and buffers."""
    kept = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before, version in kept:
                if buffer._version != version:
                    buffer.copy_(before)
