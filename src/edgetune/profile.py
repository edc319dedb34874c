"""model, sample, Plan -> Cost: what one training step keeps, needs at its worst moment, and multiplies.

`profile` predicts by running the applied model on meta tensors; `measure` runs it for real. Both go through
the watchers of `edgetune.meter`, so there is no second formula that could drift from what happens.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from edgetune.allocator import peak_during
from edgetune.apply import apply, rewrite
from edgetune.contract import Plan
from edgetune.graph import Graph, trace
from edgetune.meter import LOSS, Account, Ledger, keep_book
from edgetune.recognise import INTEGERS
from edgetune.record import Record
from edgetune.update import as_it_comes

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


class LayerCost(Record):
    """One layer in one training step. `kept_bytes`: storages it is the first to keep for backward. What a layer in
    integers holds counts among `param_bytes`.

    Matrix products and convolutions count, as multiply-accumulates; elementwise work does not.
    The row of kind "loss" is the loss function itself.
    """

    name: str
    kind: str
    param_bytes: int
    forward_macs: int
    backward_macs: int
    kept_bytes: int


class Cost(Record):
    """What one training step costs, by layer and in total.

    `peak_bytes` is training memory at the worst moment of forward and backward: gradients so far, optimizer
    state, kept bytes and whatever lives in passing. Parameters (`param_bytes`) and the batch itself stand
    beside it. With micro-batches, `kept_bytes` are those of one; MACs and `step_ms` are those of the whole
    batch. `step_ms` is forward, loss and backward; None where nothing ran.
    """

    layers: tuple[LayerCost, ...]
    param_bytes: int
    grad_bytes: int
    optimizer_bytes: int
    kept_bytes: int
    peak_bytes: int
    forward_macs: int
    backward_macs: int
    step_ms: float | None
    origin: Literal["predicted", "measured"]


def profile(model: nn.Module, sample: torch.Tensor, plan: Plan | None = None, *,
            optimizer_copies: int = 1, graph: Graph | None = None, update_as_it_comes: bool = False) -> Cost:
    """Predict a training step of `model` on a batch like `sample` x (n c h w), without computing it.

    With a plan, of the model with the plan applied, in its micro-batches; without, of plain autograd for
    everything that requires a gradient. Norms use their running statistics either way. The optimizer holds
    `optimizer_copies` numbers a learned parameter (SGD with momentum: 1, Adam: 2). With `update_as_it_comes` each
    gradient goes as soon as it is complete (see `edgetune.update`). The model is neither run nor changed; `graph`
    saves tracing anew. Raises ModelError when the model cannot run on meta tensors of that shape, PlanError or
    Refusal as `apply` does.
    """
    batch = sample.shape[0]
    with shadowed(model, sample, plan, graph) as (shadow, graph, x, device):
        accounts = keep_book(shadow, graph, x, on_labels(None, F.cross_entropy), device)
        with _freed(shadow, update_as_it_comes):
            peak = _simulated_peak(shadow, x, batch, device)
        return _cost(shadow, graph, accounts, (batch, x.shape[0]), peak, optimizer_copies, None)


def predicted_peak(model: nn.Module, sample: torch.Tensor, plan: Plan, graph: Graph, *,
                   optimizer_copies: int = 1) -> int:
    """`profile(...).peak_bytes` alone."""
    with shadowed(model, sample, plan, graph) as (shadow, _, x, device):
        peak = _simulated_peak(shadow, x, sample.shape[0], device)
        return _with_state(shadow, peak, optimizer_copies, x.shape[0] < sample.shape[0])


def predicted_kept(model: nn.Module, sample: torch.Tensor, plan: Plan, graph: Graph) -> dict[str, int]:
    """The kept bytes of `profile(...).layers` by name, alone."""
    with shadowed(model, sample, plan, graph) as (shadow, _, x, device):
        accounts = keep_book(shadow, graph, x, on_labels(None, F.cross_entropy), device)
        return {name: account.kept_bytes for name, account in accounts.items()}


def measured_peak(model: nn.Module, x: torch.Tensor, *, optimizer_copies: int = 1,
                  micro_batch: int | None = None, update_as_it_comes: bool = False) -> int:
    """`measure(...).peak_bytes` alone, from real steps of the model as it stands."""
    micro = min(micro_batch or x.shape[0], x.shape[0])
    with _training(model), _left_as_found(model), _freed(model, update_as_it_comes):
        loss = on_labels(None, F.cross_entropy)
        _pass(model, x[:micro], loss)  # what is made once and kept (tables, code) does not count
        hold_gradients(model, held=micro < x.shape[0])
        peak = peak_during(x.device, lambda: _pass(model, x[:micro], loss))
        return _with_state(model, peak, optimizer_copies, micro < x.shape[0])


def measured_ms(model: nn.Module, x: torch.Tensor, *, micro_batch: int | None = None) -> float:
    """`measure(...).step_ms` alone: the median of 3 steps, of up to 15 where they are short, after one to warm up."""
    micro, times = min(micro_batch or x.shape[0], x.shape[0]), list[float]()
    with _training(model), _left_as_found(model):
        _timed(model, x, None, F.cross_entropy, micro)
        while len(times) < 3 or (len(times) < 15 and sum(times) < 500):
            times.append(_timed(model, x, None, F.cross_entropy, micro))
    return statistics.median(times)


@contextmanager
def shadowed(model: nn.Module, sample: torch.Tensor, plan: Plan | None,
              graph: Graph | None) -> Iterator[tuple[nn.Module, Graph, torch.Tensor, torch.device]]:
    """A meta copy of the model with the plan applied, its graph, a micro-batch, and the device it stands for."""
    device, batch = next((p.device for p in model.parameters()), sample.device), sample.shape[0]
    micro = min(plan.micro_batch or batch, batch) if plan is not None else batch
    shadow, x = _shadow(model), torch.empty_like(sample[:micro], device="meta")
    with _training(shadow):
        graph = graph or trace(shadow, x)
        if plan is not None:
            if rewrite(shadow, plan, graph):
                graph = trace(shadow, x)
            apply(shadow, plan, graph)
        yield shadow, graph, x, device


def _simulated_peak(shadow: nn.Module, x: torch.Tensor, batch: int, device: torch.device) -> int:
    hold_gradients(shadow, held=x.shape[0] < batch)
    ledger = Ledger(device)
    with ledger:
        _pass(shadow, x, on_labels(None, F.cross_entropy))
    return ledger.peak_bytes


def _with_state(model: nn.Module, peak_bytes: int, optimizer_copies: int, micro: bool) -> int:
    """A pass's peak and what stands beside it: optimizer state, with micro-batches the gradients so far."""
    learned = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    return peak_bytes + optimizer_copies * learned + (learned if micro else 0)


def measure(model: nn.Module, x: torch.Tensor, y: torch.Tensor | None = None, *, loss: Loss = F.cross_entropy,
            optimizer_copies: int = 1, micro_batch: int | None = None, repeats: int = 5,
            update_as_it_comes: bool = False) -> Cost:
    """Run a training step of `model` as it stands (plan applied or not) on x (n c h w), and say what it took.

    Without y every label is class 0. The peak is the allocator's; `step_ms` is the median of `repeats`
    after one run to warm up. Norms use their running statistics; modes, gradients and random state are left
    as they were.
    """
    device, batch = x.device, x.shape[0]
    micro = min(micro_batch or batch, batch)
    part, labels = x[:micro], None if y is None else y[:micro]
    with _training(model), _left_as_found(model):
        graph = trace(model, part)
        accounts = keep_book(model, graph, part, on_labels(labels, loss), device)
        step_ms = statistics.median(_timed(model, x, y, loss, micro) for _ in range(repeats))
        hold_gradients(model, held=micro < batch)
        with _freed(model, update_as_it_comes):
            peak = peak_during(device, lambda: _pass(model, part, on_labels(labels, loss)))
        return _cost(model, graph, accounts, (batch, micro), peak, optimizer_copies, step_ms)


def _shadow(model: nn.Module) -> nn.Module:
    """A copy of the model whose tensors are all on meta: nothing of its size is allocated."""
    tensors = [*model.parameters(), *model.buffers(),
               *(value for module in model.modules() for value in vars(module).values()
                 if isinstance(value, torch.Tensor))]
    return copy.deepcopy(model, {id(tensor): _meta_twin(tensor) for tensor in tensors})


def _meta_twin(tensor: torch.Tensor) -> torch.Tensor:
    twin = torch.empty_like(tensor, device="meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode inside, batch norms on their running statistics; every module's mode restored after."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        module.training = not norm
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Gradients set aside and put back; random state and what norms learn of their batches restored."""
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    norms = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training)
    running = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        with torch.random.fork_rng():
            hold_gradients(model, held=False)
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        for buffer, before in running:
            buffer.copy_(before)


def hold_gradients(model: nn.Module, held: bool) -> None:
    """What a pass finds: gradients of the micro-batches before it, or none."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if held and parameter.requires_grad else None


@contextmanager
def _freed(model: nn.Module, as_they_come: bool) -> Iterator[None]:
    """Gradients are dropped as they come, if asked for."""
    with as_it_comes(model, lambda parameter: None) if as_they_come else nullcontext():
        yield


def on_labels(y: torch.Tensor | None, loss: Loss) -> Callable[[Any], torch.Tensor]:
    """The loss of an output; class 0 is the label where none is given."""
    def of(out: Any) -> torch.Tensor:
        if y is not None:
            return loss(out, y)
        if isinstance(out, torch.Tensor) and out.dim() > 1:
            return loss(out, torch.zeros((out.shape[0], *out.shape[2:]), dtype=torch.long, device=out.device))
        # several outputs, or one number a sample: every one takes part
        values = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        return torch.stack([value.float().sum() for value in values]).sum()
    return of


def _pass(model: nn.Module, x: torch.Tensor, loss: Callable[[Any], torch.Tensor]) -> None:
    value = loss(model(x))
    if value.requires_grad:
        value.backward()


def _timed(model: nn.Module, x: torch.Tensor, y: torch.Tensor | None, loss: Loss, micro: int) -> float:
    """Milliseconds of forward, loss and backward over the whole batch."""
    hold_gradients(model, held=False)
    _wait(x.device)
    start = time.perf_counter()
    for first in range(0, x.shape[0], micro):
        part, labels = x[first:first + micro], None if y is None else y[first:first + micro]
        _pass(model, part, on_labels(labels, loss))
    _wait(x.device)
    return 1e3 * (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cost(model: nn.Module, graph: Graph, accounts: dict[str, Account], batches: tuple[int, int],
          peak_bytes: int, optimizer_copies: int, step_ms: float | None) -> Cost:
    batch, micro = batches
    learned = sum(_bytes(p) for p in model.parameters() if p.requires_grad)
    layers = tuple(_layers(model, graph, accounts, batches))
    held = [*_owned(model).values(), *(t for name in _in_integers(graph) for t in model.get_submodule(name).buffers())]
    return Cost(layers=layers, param_bytes=sum(map(_bytes, held)), grad_bytes=learned,
                optimizer_bytes=optimizer_copies * learned,
                kept_bytes=sum(layer.kept_bytes for layer in layers),
                peak_bytes=_with_state(model, peak_bytes, optimizer_copies, micro < batch),
                forward_macs=sum(layer.forward_macs for layer in layers),
                backward_macs=sum(layer.backward_macs for layer in layers), step_ms=step_ms,
                origin="predicted" if step_ms is None else "measured")


def _layers(model: nn.Module, graph: Graph, accounts: dict[str, Account],
            batches: tuple[int, int]) -> Iterator[LayerCost]:
    """A row for every layer in the order of execution, then for whoever else kept or multiplied something."""
    batch, micro = batches
    kinds = {call.name: call.kind for call in graph.calls if call.kind not in ("input", "output")}
    kinds |= {owner: LOSS if owner == LOSS else "other" for owner, account in accounts.items()
              if owner not in kinds and account != Account()}
    roles = {call.name: call.params.values() for call in graph.calls}
    waiting, integers = _owned(model), _in_integers(graph)  # a parameter that layers share is listed with the first
    for name, kind in kinds.items():
        own: list[torch.Tensor] = [waiting.pop(role) for role in roles.get(name, ()) if role in waiting]
        if name in integers:
            own += [*model.get_submodule(name).parameters(), *model.get_submodule(name).buffers()]
        account = accounts.get(name, Account())
        yield LayerCost(name=name, kind=kind, param_bytes=sum(_bytes(p) for p in own),
                        forward_macs=account.forward_macs * batch // micro,
                        backward_macs=account.backward_macs * batch // micro, kept_bytes=account.kept_bytes)


def _in_integers(graph: Graph) -> set[str]:
    """The layers that are networks in integers: their weights are buffers."""
    return {call.name for call in graph.layers(INTEGERS)}


def _owned(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by name, without those that are a part of another one's memory."""
    spans: dict[int, list[tuple[int, int]]] = {}
    owned = {}
    for name, parameter in model.named_parameters():
        first = int(parameter.storage_offset())
        last = first + int(sum((n - 1) * step for n, step in zip(parameter.shape, parameter.stride(), strict=True)))
        beside = spans.setdefault(parameter.untyped_storage()._cdata, [])
        if not any(start <= first and last <= end for start, end in beside):
            beside.append((first, last))
            owned[name] = parameter
    return owned


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
