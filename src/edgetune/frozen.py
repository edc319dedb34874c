"""The frozen part of a network in integers: int8 weights and maps in front of the first layer that learns.

What is in front of the cut (`cache.cut`) becomes an integer network of its own (`quantize`), and its float tensors are
let go of. Behind it the network is what it was, reads the dequantised map, and takes a plan like any other.

    front = integer_front(model, plan, batches)      the model stays as it is
    install(model, front)                            in place; then apply(model, front.left_over(plan))

A plan that rewrites blocks comes first: `apply.rewrite`, then `install`.
A new way to hold the frozen part is a new `install` with its module.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from edgetune.apply import apply
from edgetune.cache.cut import copy_nodes, find_cut, tensors_read
from edgetune.contract import Plan
from edgetune.errors import ModelError, Refusal, RunError, WeightsError
from edgetune.fold import compiled
from edgetune.graph import Rerouted, evaluating, follow, reroute, tensor_of
from edgetune.quantize import Quantized, QuantizedNetwork, quantize
from edgetune.recognise import IntegerLayer
from edgetune.record import Record

NAME = "integer_front"
"""The qualified name of the integer part within its network."""
AT_ONCE = 2**19
"""Numbers of the largest map that are on their way at a time: integers come out the same, in less memory."""
LEARN_LESS = "let fewer layers learn, or train without --frozen-bits"
LEARN_MORE = "let it learn too, and all behind it, or train without --frozen-bits"


class FrozenPart(Record):
    """What became of the frozen part: up to `layer`, whose call is `node`, its `float_bytes` became `integer_bytes`.

    `shape` is that of a sample behind it, `digest` of its integers.
    """

    bits: Literal[8] = 8
    layer: str
    node: str
    shape: tuple[int, ...]
    digest: str
    float_bytes: int
    integer_bytes: int


@dataclass(frozen=True)
class Front:
    """The frozen part of a network in integers, not yet in its place."""

    part: FrozenPart
    quantized: Quantized

    def left_over(self, plan: Plan) -> Plan:
        """What a plan says of the layers that are still there."""
        gone = {layer.name for layer in self.quantized.graph.layers}
        return plan.model_copy(update={"layers": {k: v for k, v in plan.layers.items() if k not in gone}})

    def save(self, path: Path) -> None:
        """Write the integers as one file."""
        self.quantized.save(path)

    @classmethod
    def load(cls, path: Path, part: FrozenPart) -> Front:
        """Read back what `save` wrote. Raises RunError when it is missing, damaged or not that of `part`."""
        try:
            found = Quantized.load(path)
        except WeightsError as failure:
            raise RunError(f"{failure}, or train anew") from failure
        if found.digest() != part.digest:
            raise RunError(f"'{path}' is not the frozen part that the run was trained behind: put it back as it was, "
                           "or train anew")
        return cls(part, found)


class IntegerFront(IntegerLayer):
    """x (n c h w) float -> what is behind the frozen part, dequantised: float (n *shape)."""

    def __init__(self, front: Front) -> None:
        super().__init__()
        self.network = QuantizedNetwork(front.quantized).requires_grad_(False)
        for conv in self.network.convs():
            del conv.gain  # only training reads it
        self.shape, self.digest = front.part.shape, front.part.digest
        maps = [layer.shape for layer in front.quantized.graph.layers if layer.op != "linear"]
        largest = max(torch.Size(shape).numel() for shape in (front.quantized.graph.input_shape[1:], *maps))
        self.at_once = max(1, AT_ONCE // largest)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.network(part) for part in x.split(self.at_once)]
        return torch.cat(parts).reshape(len(x), *self.shape)

    def extra_repr(self) -> str:
        return f"digest={self.digest}"


def integer_front(model: nn.Module, plan: Plan, batches: Iterable[torch.Tensor]) -> Front:
    """The frozen part of `model` as `plan` trains it, with ranges from `batches` x (n c h w), preprocessed.

    The model is left as it was. Raises Refusal, naming the layer, where nothing is frozen in front of what learns or
    a layer has no integer step; PlanError as `apply` does.
    """
    _refuse_second(model)
    modes = {module: module.training for module in model.modules()}
    undo = apply(model, plan)
    try:
        return front_of(model.train(), batches)
    finally:
        undo()
        for module, mode in modes.items():
            module.training = mode


def front_of(model: nn.Module, batches: Iterable[torch.Tensor]) -> Front:
    """The same of a network as it trains: with its plan applied, or flags set, in the mode that it trains in."""
    pictures = list(batches)
    _refuse_second(model)
    with _way_out(LEARN_LESS):
        cut = find_cut(model, pictures[0].shape[1:], share=0.0)
    value, layer = cut.values[0], cut.layers[0]
    split = _split(model, False, value.node, layer)
    with _way_out(LEARN_MORE, ", so the frozen part cannot be held in 8 bits"):
        quantized = quantize(fx.GraphModule(model, split.ahead), pictures)
    part = FrozenPart(layer=layer, node=value.node, shape=value.shape, digest=quantized.digest(), integer_bytes=0,
                      float_bytes=_bytes(tensor_of(model, name) for name in split.only_ahead))
    held = IntegerFront(Front(part, quantized))
    taken = _bytes((*held.parameters(), *held.buffers()))
    return Front(part.model_copy(update={"integer_bytes": taken}), quantized)


def install(model: nn.Module, front: Front) -> None:
    """Put the integers in place of the frozen part, which is let go of; before a plan is applied.

    Parameters and buffers of the frozen part become None, `state_dict` has the integers in their stead, and the model
    answers from them in training and evaluation alike. `remove` takes it back but for the float numbers.
    """
    _refuse_second(model)
    if "_edgetune" in model.__dict__:
        raise ModelError("a plan is applied to this network already: call its undo, then put the integers in place")
    splits = {mode: _split(model, mode, front.part.node, front.part.layer) for mode in (False, True)}
    graphs = {mode: split.behind for mode, split in splits.items()}
    device = next(model.parameters()).device
    model.add_module(NAME, IntegerFront(front).to(device).train(model.training))
    model.__dict__[_TAKEN] = [_take(model, name) for name in sorted(splits[False].only_ahead)]
    reroute(model, Rerouted(graphs, splits[False].opaque))
    model.forward = types.MethodType(_forward_by({mode: compiled(model, g) for mode, g in graphs.items()}), model)


def remove(model: nn.Module) -> None:
    """Give a network its frozen float tensors back, without their numbers: load them next."""
    device = next(model.parameters()).device
    delattr(model, NAME)
    reroute(model, None)
    del model.__dict__["forward"]
    for put_back in model.__dict__.pop(_TAKEN):
        put_back(model, device)


def restore(model: nn.Module, path: Path, part: FrozenPart | None) -> Front | None:
    """Make `model` what a run trained: with the integers of the file `path` (`part` None: in float), numbers to be
    loaded next. Raises RunError as `Front.load` does."""
    if has_front(model):
        remove(model)
    if part is None:
        return None
    front = Front.load(path, part)
    install(model, front)
    return front


def has_front(model: nn.Module) -> bool:
    """Whether the frozen part of a network is in integers."""
    return NAME in model._modules


_TAKEN = "_edgetune_taken"


def _refuse_second(model: nn.Module) -> None:
    if has_front(model):
        raise Refusal(NAME, "holds a frozen part in integers already",
                      "build the network anew from its float weights, or train what it has without --frozen-bits")


@contextmanager
def _way_out(way_out: str, so: str = "") -> Iterator[None]:
    """Refusals of cut and quantizer, with what someone can do who wants the frozen part in integers."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(refusal.layer, refusal.reason + so, way_out) from refusal


@dataclass(frozen=True)
class _Split:
    """A network's graph up to the cut, and the whole with the integer part in its place.

    `only_ahead` names the tensors that nothing else reads, `opaque` what could not be followed.
    """

    ahead: fx.Graph
    behind: fx.Graph
    only_ahead: frozenset[str]
    opaque: dict[str, str]


def _split(model: nn.Module, training: bool, end: str, layer: str) -> _Split:
    """Split the network's own graph, plan or no plan, behind the node `end`, whose layer is `layer`."""
    flow, opaque = _followed(model, training)
    nodes = [] if flow is None else [node for node in flow.nodes if node.op != "get_attr"]
    at = next((i for i, node in enumerate(nodes) if node.name == end), 0)
    early, late = nodes[:at], nodes[at + 1 :]
    if at == 0 or any(user in late for node in early for user in node.users):
        raise Refusal(layer, "is no place where a single value crosses in the network's own forward", LEARN_LESS)
    ahead, behind = fx.Graph(), fx.Graph()
    copy_nodes(ahead, [*early, nodes[at]], {}, [nodes[at]])
    output = next(node for node in ahead.nodes if node.op == "output")
    output.args = (output.all_input_nodes[0],)
    value = behind.create_node("call_module", NAME, (behind.placeholder(nodes[0].name),), name=NAME)
    copy_nodes(behind, late, {nodes[at]: value}, None)
    only_ahead = tensors_read(model, ahead.nodes) - tensors_read(model, (n for n in behind.nodes if n is not value))
    # counters of norms stay: torch adds them to a state dict that lacks them
    only_ahead = {name for name in only_ahead if tensor_of(model, name).dim() > 0}
    return _Split(ahead, behind, frozenset(only_ahead), opaque)


def _followed(model: nn.Module, training: bool) -> tuple[fx.Graph | None, dict[str, str]]:
    """The graph of a mode; norms have their running statistics in both, as they do while they are trained here."""
    with evaluating(model):
        for module in model.modules():
            module.training = training and not isinstance(module, nn.modules.batchnorm._BatchNorm)
        return follow(model)


def _take(model: nn.Module, name: str) -> Callable[[nn.Module, torch.device], None]:
    """Let go of a tensor; gives what puts another of its kind in its place."""
    owner, _, leaf = name.rpartition(".")
    before = tensor_of(model, name)
    like, learns = torch.empty_like(before, device="meta"), before.requires_grad
    is_parameter = isinstance(before, nn.Parameter)

    def put_back(model: nn.Module, device: torch.device) -> None:
        empty = torch.empty_like(like, device=device)
        _slots(model.get_submodule(owner), is_parameter)[leaf] = nn.Parameter(empty, learns) if is_parameter else empty

    _slots(model.get_submodule(owner), is_parameter)[leaf] = None
    return put_back


def _slots(module: nn.Module, parameters: bool) -> dict[str, Any]:
    return module._parameters if parameters else module._buffers


def _forward_by(code: dict[bool, Callable[..., Any]]) -> Callable[..., Any]:
    """A forward that runs the code of the present mode."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return code[self.training](self, *args, **kwargs)

    return forward


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
