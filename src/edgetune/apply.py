"""model, Plan -> model': swap the backward pass in place, before DistributedDataParallel and the optimizer are made.

First methods rewrite the blocks and layers that the plan gives to them, and the network is traced anew. Parameters,
state_dict keys and module types stay, beside what a rewriting adds. The model's `forward` is routed through code
generated from its own graph, in which the planned segments are single calls; without gradients the original forward
runs.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from edgetune.blocks import as_block
from edgetune.claims import check_use, claim, remembering, stretches, without
from edgetune.contract import ArithmeticMethod, Method, Plan, Segment, qualified
from edgetune.errors import PlanError, Refusal
from edgetune.graph import Graph, carries_hooks, rerouted, trace
from edgetune.hosts.arithmetic import arithmetic_layers
from edgetune.recognise import ARITHMETIC
from edgetune.rewire import rewire
from edgetune.route import route, route_module

_NORMS = (nn.modules.batchnorm._BatchNorm,)


@dataclass
class Undo:
    """Call it to give the model back as it was: forward, modes and flags; what was learned stays."""

    _steps: list[Callable[[], None]] = field(default_factory=list)
    segments: tuple[Segment, ...] = ()

    def add(self, step: Callable[[], None]) -> None:
        """One more thing to take back; the last is taken back first."""
        self._steps.append(step)

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __call__(self) -> None:
        while self._steps:
            self._steps.pop()()


def apply(model: nn.Module, plan: Plan, graph: Graph | None = None) -> Undo:
    """Make `model` train as `plan` says, in place; returns the undo.

    Only what the plan lists learns; batch norms keep their running statistics unless the plan says otherwise. What
    `rewrite` has changed before stays so when this is undone. `graph` saves tracing anew. Raises PlanError for layers
    that the model does not have, Refusal for layers that a method cannot take.
    """
    if "_edgetune" in model.__dict__:
        raise PlanError("a plan is applied to this model already: call its undo first")
    graph = graph or trace(model, _zeros(model, plan.input_shape))
    _check_layers(model, graph, plan)
    undo = rewrite(model, plan, graph)
    try:
        if undo:
            graph = trace(model, _zeros(model, graph.input_shape))
        _check_learned(model, plan)
        hooked = _hooked(model)
        graph = without(graph, {call.node for call in graph.calls if call.name in hooked})
        graph = _remember(model, _prepare(model, graph, plan, undo), plan, undo)
        check_use(graph, plan)
        _choose_what_learns(model, plan, undo)
        if plan.norms == "frozen":
            _freeze_statistics(model, undo)
        segments = claim(graph, plan)
        undo.segments = tuple(segments)
        followed = [segment for segment in segments if segment.calls[0].followed]
        undo.add(route(model, followed, stretches(graph, plan, followed, hooked)))
        for segment in segments:
            if not segment.calls[0].followed:
                undo.add(route_module(model, segment))
    except BaseException:
        undo()
        raise
    return undo


@contextmanager
def prepared(model: nn.Module, graph: Graph, plan: Plan) -> Iterator[Graph]:
    """The graph that knows of the parameters which learn in place of a layer's own, and of what methods remember;
    inside, the model has them."""
    undo = Undo()
    try:
        yield _remember(model, _prepare(model, graph, plan, undo), plan, undo)
    finally:
        undo()


def rewrite(model: nn.Module, plan: Plan, graph: Graph | None = None) -> Undo:
    """Give `model` the blocks and layers that the plan's methods make of its own, in place, and nothing else; returns
    the undo.

    So a network takes the weights of a run whose plan rewrote it. What is rewritten already is left as it is.
    Raises PlanError and Refusal as `apply` does.
    """
    undo, blocks, layers = Undo(), _blocks_to_rewrite(model, plan), _layers_to_rewrite(model, plan)
    if not blocks and not layers:
        return undo
    if rerouted(model) is not None:
        raise Refusal(min({**blocks, **layers}), "is to be rewritten, but the network runs another graph than its own "
                      "already", "rewrite all in one plan, and before the frozen part is put in integers")
    graph = graph or trace(model, _zeros(model, plan.input_shape))
    _check_layers(model, graph, plan.model_copy(
        update={"layers": {name: plan.layers[name] for name in (*blocks, *layers)}}))
    try:
        for name, stack in blocks.items():
            module, block = _module(model, name), as_block(graph, name)
            assert block is not None
            for method in stack:
                undo.add(method.rewrite(module, block))
            undo.add(_mark(module, stack))
        if layers:
            undo.add(rewire(model, graph if not blocks else trace(model, _zeros(model, plan.input_shape)), layers))
    except BaseException:
        undo()
        raise
    return undo


def _blocks_to_rewrite(model: nn.Module, plan: Plan) -> dict[str, tuple[Method, ...]]:
    """The blocks that the plan rewrites and nobody has yet."""
    wanted = {}
    for name, stack in plan.rewritten().items():
        done = _module(model, name).__dict__.get(_REWRITTEN, stack)
        if done != stack:
            raise _other_plan(f"block '{name}'")
        if _REWRITTEN not in _module(model, name).__dict__:
            wanted[name] = stack
    return wanted


def _layers_to_rewrite(model: nn.Module, plan: Plan) -> dict[str, ArithmeticMethod]:
    """The layers whose numbers the plan changes and nobody has yet."""
    wanted, done = plan.arithmetic(), {name: layer.method for name, layer in arithmetic_layers(model).items()}
    for name in wanted.keys() & done.keys():
        if wanted[name] != done[name]:
            raise _other_plan(f"layer '{name}'")
    return {name: method for name, method in wanted.items() if name not in done}


def _other_plan(what: str) -> PlanError:
    return PlanError(f"the plan rewrites {what}, which another plan has rewritten: undo that one first")


_REWRITTEN = "_edgetune_rewritten"


def _mark(module: nn.Module, stack: tuple[Method, ...]) -> Callable[[], None]:
    module.__dict__[_REWRITTEN] = stack

    def unmark() -> None:
        del module.__dict__[_REWRITTEN]
    return unmark


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as failure:
        raise _unknown(name) from failure


def _unknown(layer: str) -> PlanError:
    return PlanError(f"the plan speaks of layer '{layer}', which this model does not have or does not call: "
                     "make a plan for this very model with `edgetune plan`")


def trace_rewritten(model: nn.Module, plan: Plan, sample: torch.Tensor) -> Graph:
    """The graph of the network that the plan makes of `model`, which stays as it is."""
    undo = rewrite(model, plan)
    try:
        return trace(model, sample)
    finally:
        undo()


def _zeros(model: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    first = next(model.parameters(), torch.zeros(()))
    return torch.zeros(shape, device=first.device, dtype=first.dtype)


def _check_layers(model: nn.Module, graph: Graph, plan: Plan) -> None:
    """Refuse what the plan gives to layers or blocks that cannot take it."""
    calls = {call.name: call for call in graph.calls if call.params}
    hooked = _hooked(model)
    for layer, stack in plan.layers.items():
        if layer in hooked:
            raise Refusal(layer, "carries hooks, which a planned backward pass would leave out",
                          "remove the hooks first, or take the layer out of the plan")
        if layer not in calls:
            _module(model, layer)
            calls |= {layer: block} if (block := as_block(graph, layer)) else {}
        for method in stack:
            if layer not in calls:
                raise _no_block(layer) if method.rewrites else _unknown(layer)
            if isinstance(method, ArithmeticMethod) and calls[layer].kind == ARITHMETIC:
                continue  # it is by this method already, or `rewrite` would have refused
            reason = method.refuse(calls[layer])
            if reason is not None:
                head, _, way_out = reason.partition(": ")
                raise Refusal(layer, head, way_out or "leave it out of the plan")


def _no_block(name: str) -> Refusal:
    return Refusal(name, "is no part of the network that takes one map and gives one",
                   "name a block of convolutions, or leave it out of the plan")


def _check_learned(model: nn.Module, plan: Plan) -> None:
    missing = plan.listed() - {name for name, _ in model.named_parameters()}
    if missing:
        raise PlanError(f"the plan trains '{sorted(missing)[0]}', which is no parameter of this model: "
                        "make a plan for this very model with `edgetune plan`")
    for layer in plan.layers:
        _check_stack(plan, layer)


def _check_stack(plan: Plan, layer: str) -> None:
    """Refuse methods of one layer that leave no sense together, or of which nothing would learn."""
    first: dict[str, Method] = {}
    for method in plan.layers[layer]:
        other = first.setdefault(method.family, method)
        if other is not method:
            raise Refusal(layer, f"is given two {method.family} methods, {other.method} and {method.method}, which "
                          "nothing composes", "keep one of them")
        roles = set(method.learns_as)
        if roles and not roles & set(plan.learns.get(layer, ())):
            raise Refusal(layer, f"is given {method.method}, but its {' and '.join(sorted(roles))} does not learn",
                          f"list it under `learns`, or take {method.method} out of the plan")


def _hooked(model: nn.Module) -> set[str]:
    """Names of the modules on which someone has registered hooks."""
    return {name for name, module in model.named_modules() if name and carries_hooks(module)}


def _prepare(model: nn.Module, graph: Graph, plan: Plan, undo: Undo) -> Graph:
    """Let methods add the parameters that learn in place of a layer's own; gives the graph that knows of them."""
    added: dict[str, dict[str, str]] = {}
    for call in graph.layers():
        for method in plan.layers.get(call.name, ()):
            if call.name not in added and plan.stand_ins(call.name).keys() & method.learns_as.keys():
                undo.add(method.prepare(model.get_submodule(call.name), call))
                added[call.name] = {role: qualified(call.name, role) for role in method.learns_as.values()}
    return graph.model_copy(update={"calls": tuple(
        call.model_copy(update={"params": {**call.params, **added[call.name]}}) if call.name in added else call
        for call in graph.calls)})


def _remember(model: nn.Module, graph: Graph, plan: Plan, undo: Undo) -> Graph:
    """Give layers what methods remember of them, as buffers; gives the graph that knows of these."""
    graph, state = remembering(graph, plan)
    for name, tensor in state.items():
        layer, _, role = name.rpartition(".")
        module = model.get_submodule(layer)
        module.register_buffer(role, tensor.to(next(module.parameters()).device), persistent=False)
        undo.add(partial(module.__delattr__, role))
    return graph


def _choose_what_learns(model: nn.Module, plan: Plan, undo: Undo) -> None:
    learned = plan.learned()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad != (name in learned):
            undo.add(_restore_flag(parameter))
            parameter.requires_grad_(name in learned)


def _restore_flag(parameter: nn.Parameter) -> Callable[[], None]:
    before = parameter.requires_grad

    def restore() -> None:
        parameter.requires_grad_(before)
    return restore


def _stay_frozen(self: nn.Module, mode: bool = True) -> nn.Module:
    """A norm's `train` that keeps its running statistics, whatever the model around it does."""
    self.training = False
    return self


def _freeze_statistics(model: nn.Module, undo: Undo) -> None:
    for module in model.modules():
        if isinstance(module, _NORMS) and module.running_mean is not None:
            before = module.training
            module.train = types.MethodType(_stay_frozen, module)  # type: ignore[method-assign]
            module.training = False
            undo.add(_thaw(module, before))


def _thaw(module: nn.Module, before: bool) -> Callable[[], None]:
    def restore() -> None:
        del module.__dict__["train"]
        module.training = before
    return restore
