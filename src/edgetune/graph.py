"""model -> Graph: one record per call of a layer, found by tracing, never by a table of model names.

`torch.fx` follows the whole network without fixing the batch or the map size. A submodule that it cannot follow
becomes an opaque call (the reason is kept); the layers inside are still listed, and one-layer methods still reach them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from edgetune.errors import ModelError
from edgetune.overlap import ConvGeometry
from edgetune.recognise import describe_function, describe_method, describe_module, is_layer
from edgetune.record import Record

Shape = tuple[int, ...]


class Call(Record):
    """One call of one layer. Shapes are those of the sample; `inputs` and `consumers` are node names.

    `kind` is conv, linear, norm, activation, max_pool, mean, add, scale, subsample (every n-th pixel), pad (zero
    channels), arithmetic (a convolution by a method of that family), dropout, flatten, input, output, opaque or other;
    `function` names the torch function or that method; `params` maps a role (weight, bias, running_mean ...) to a
    qualified name, `state` a role of what a method remembers there. `scope` is the submodule whose forward makes the
    call.
    """

    name: str
    node: str
    kind: str
    function: str
    inputs: tuple[str, ...] = ()
    consumers: tuple[str, ...] = ()
    in_shapes: tuple[Shape, ...] = ()
    out_shape: Shape = ()
    params: dict[str, str] = {}
    param_shapes: dict[str, Shape] = {}
    state: dict[str, str] = {}
    geometry: ConvGeometry | None = None
    attributes: dict[str, float | int | bool | str | None] = {}
    in_place: bool = False
    followed: bool = True
    scope: str = ""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward pass for the sample's batch (conv and linear; others count zero)."""
        batch = self.out_shape[0] if self.out_shape else 0
        if self.geometry is not None:
            return batch * self.geometry.macs
        if self.kind == "linear" and "weight" in self.param_shapes:
            rows = 1
            for size in self.out_shape[:-1]:
                rows *= size
            return rows * self.param_shapes["weight"][0] * self.param_shapes["weight"][1]
        return 0


class Graph(Record):
    """A network as its calls, in the order of execution. `opaque` maps what could not be followed to the reason."""

    input_shape: Shape
    calls: tuple[Call, ...]
    opaque: dict[str, str] = {}

    def __getitem__(self, node: str) -> Call:
        for call in self.calls:
            if call.node == node:
                return call
        raise KeyError(node)

    def layers(self, *kinds: str) -> tuple[Call, ...]:
        """The calls that own parameters, or those of the given kinds."""
        if kinds:
            return tuple(call for call in self.calls if call.kind in kinds)
        return tuple(call for call in self.calls if call.params)

    def overwrites_for_others(self, call: Call) -> bool:
        """Whether others read the input that an in-place call changes: out of place it would mean something else."""
        return call.in_place and call.followed and len(self[call.inputs[0]].consumers) > 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass over the sample."""
        return sum(call.macs for call in self.calls)


class LayerTracer(fx.Tracer):
    """Follows a model down to its layers; what cannot be followed becomes one call, with the reason kept."""

    def __init__(self) -> None:
        super().__init__()
        self.opaque: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_layer(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        before, stack = len(self.graph.nodes), dict(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as failure:
            self.module_stack.clear()
            self.module_stack.update(stack)
            # whatever a person's forward may raise on a proxy: the call is kept whole, and the reason with it
            for node in reversed(list(self.graph.nodes)[before:]):
                self.graph.erase_node(node)
            self.opaque[name] = f"{type(failure).__name__}: {failure}".splitlines()[0]
            return self.create_proxy("call_module", name, args, kwargs)


@dataclass(frozen=True)
class Rerouted:
    """What a network computes by mode (training or not), where that is no longer what its class says."""

    graphs: Mapping[bool, fx.Graph]
    opaque: Mapping[str, str]


_REROUTED = "_edgetune_rerouted"


def reroute(model: nn.Module, by: Rerouted | None) -> None:
    """Let `follow` give another dataflow for `model` than its class's; None takes that back."""
    if by is None:
        del model.__dict__[_REROUTED]
    else:
        model.__dict__[_REROUTED] = by


def rerouted(model: nn.Module) -> Rerouted | None:
    """What `reroute` said of a model."""
    by: Rerouted | None = model.__dict__.get(_REROUTED)
    return by


def follow(model: nn.Module) -> tuple[fx.Graph | None, dict[str, str]]:
    """The dataflow of `model` as an `fx` graph, or None with the reason under the name ''."""
    by = rerouted(model)
    if by is not None:
        return copy.deepcopy(by.graphs[model.training]), dict(by.opaque)
    tracer = LayerTracer()
    try:
        graph = tracer.trace(model)
    except Exception as failure:
        return None, {"": f"{type(failure).__name__}: {failure}".splitlines()[0]}
    return graph, tracer.opaque


def trace(model: nn.Module, sample: torch.Tensor) -> Graph:
    """Trace `model` on `sample` x (n c h w), in evaluation mode and without gradients; its state is left as found.

    Raises ModelError when the model cannot run on the sample at all.
    """
    with evaluating(model), torch.no_grad():
        graph, opaque = follow(model)
        try:
            if graph is None:
                calls = _watch(model, model, sample, "")
            else:
                runner = _Recorder(model, graph)
                runner.run(sample)
                calls = runner.calls
        except (RuntimeError, ValueError, TypeError) as failure:
            raise ModelError(f"{type(model).__name__} does not run on an input of shape {tuple(sample.shape)} "
                             f"({str(failure).splitlines()[0]}): give a sample as the network expects it") from failure
    return Graph(input_shape=tuple(sample.shape), calls=tuple(_with_consumers(calls)), opaque=opaque)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode restored after."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Recorder(fx.Interpreter):
    """Runs the traced graph once and writes down what each node was given and gave."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, graph=graph)
        self.model = model
        self.calls: list[Call] = []

    def run_node(self, n: fx.Node) -> Any:
        inner: list[Call] = []
        module = self.model.get_submodule(str(n.target)) if n.op == "call_module" else None
        if module is not None and not is_layer(module) and any(True for _ in module.children()):
            with _watching(self.model, module, str(n.target), inner):
                out = super().run_node(n)
        else:
            out = super().run_node(n)
        if n.op != "get_attr":
            self.calls.append(self._call(n, module, out))
        self.calls += inner
        return out

    def _call(self, n: fx.Node, module: nn.Module | None, out: Any) -> Call:
        values = [self.env[a] for a in n.all_input_nodes if a.op != "get_attr"]
        given = [value for value in values if isinstance(value, torch.Tensor)]
        if n.op in ("placeholder", "output"):
            facts: dict[str, Any] = {"kind": {"placeholder": "input"}.get(n.op, n.op), "function": n.op}
        elif module is not None:
            facts = describe_module(module, str(n.target), given)
        elif n.op == "call_method":
            facts = describe_method(n, given)
        else:
            facts = describe_function(n, given)
        facts["scope"] = _scope(n)
        return _make_call(self.model, facts.pop("name", n.name), n.name,
                          tuple(a.name for a in n.all_input_nodes if a.op != "get_attr"), given, out, facts)


def _scope(node: fx.Node) -> str:
    """The submodule whose forward makes a call; for the call of a module, the one that calls it."""
    stack = [name for name, _ in node.meta.get("nn_module_stack", {}).values()]
    return next((name for name in reversed(stack) if node.op != "call_module" or name != node.target), "")


def _make_call(model: nn.Module, name: str, node: str, inputs: tuple[str, ...], given: list[torch.Tensor],
               out: Any, facts: dict[str, Any]) -> Call:
    params: dict[str, str] = facts.pop("params", {})
    shapes = {role: tuple(tensor_of(model, qualified).shape) for role, qualified in params.items()}
    return Call(name=name, node=node, inputs=inputs, in_shapes=tuple(tuple(x.shape) for x in given),
                out_shape=tuple(out.shape) if isinstance(out, torch.Tensor) else (), params=params,
                param_shapes=shapes, **facts)


def carries_hooks(module: nn.Module) -> bool:
    """Whether someone has registered hooks on this very module; calls to it must stay real calls."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def tensor_of(model: nn.Module, qualified: str) -> torch.Tensor:
    """The parameter or buffer of that qualified name."""
    owner, _, leaf = qualified.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def not_finite(model: nn.Module) -> str | None:
    """The first parameter or buffer of a model's state that has a value which is not finite, or None."""
    return next((name for name, tensor in model.state_dict().items()
                 if tensor.is_floating_point() and not bool(tensor.isfinite().all())), None)


@contextmanager
def _watching(model: nn.Module, root: nn.Module, prefix: str, calls: list[Call]) -> Iterator[None]:
    """Write down the layers called inside `root`, which could not be followed."""

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            given = [x for x in args if isinstance(x, torch.Tensor)]
            facts = {**describe_module(module, name, given), "followed": False}
            calls.append(_make_call(model, facts.pop("name"), f"{name}#{len(calls)}", (), given, out, facts))
        return record

    named = [(f"{prefix}.{name}".strip("."), m) for name, m in root.named_modules() if is_layer(m)]
    handles = [m.register_forward_hook(hook(name)) for name, m in named]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(model: nn.Module, root: nn.Module, sample: torch.Tensor, prefix: str) -> list[Call]:
    calls: list[Call] = []
    with _watching(model, root, prefix, calls):
        root(sample)
    return calls


def _with_consumers(calls: list[Call]) -> Iterator[Call]:
    readers: dict[str, list[str]] = {}
    for call in calls:
        for node in call.inputs:
            readers.setdefault(node, []).append(call.node)
    for call in calls:
        yield call.model_copy(update={"consumers": tuple(readers.get(call.node, ()))})
