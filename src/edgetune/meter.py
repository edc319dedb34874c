"""Watching one training step: who allocates what, how long it lives, what is kept, who multiplies.

The same watchers serve a step on meta tensors, which predicts, and a real one, which measures. Everything
hangs on the identity of storages: meta storages have no address, and views, in-place results and tensors
that several layers keep are one allocation. Only what the step itself allocates counts, so parameters and
the batch stay out.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune.contract import Segment
from edgetune.graph import Graph, follow
from edgetune.hosts.cursor import current_call, current_passes, working_on
from edgetune.kernels import status
from edgetune.kernels.binary_format import BinaryLayer
from edgetune.kernels.calls import SUFFIX
from edgetune.kernels.schema import OPS
from edgetune.outcome import foreseen, tensors_in
from edgetune.route import routed_graph
from edgetune.scratch import scratch_bytes

LOSS = "loss"
"""The owner of what the loss function itself keeps."""

aten = torch.ops.aten


class Ledger(TorchDispatchMode):
    """Follows every storage that the step allocates: `live_bytes` now, `peak_bytes` at the worst moment.

    `device` is where the step is meant to run: on meta tensors the ledger does what that device would do.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.live_bytes = self.peak_bytes = 0
        self.live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        out = self._run(func, args, kwargs or {})
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given and storage._cdata not in self.live:
                self._allocated(storage)
        return out

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_meta:
            return func(*args, **kwargs)
        if func.namespace == "edgetune" and not _native(self.device, args[0].dtype):
            with self:  # what the fallback needs on the way is allocated too
                return OPS[func._schema.name.split("::")[1]].fallback(*args, **kwargs)
        on_cpu = self.device.type == "cpu"

        def run() -> Any:
            if func is aten.native_batch_norm.default and not args[5] and on_cpu:
                # on a CPU a norm in evaluation saves no batch statistics; on meta it does, 8 bytes a channel
                return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)
            return func(*args, **kwargs)

        out, scratch = foreseen(func, args, kwargs, (on_cpu, torch._C._get_mkldnn_enabled()), run,
                                lambda: scratch_bytes(func, args) if on_cpu else 0)
        self._reached(self.live_bytes + scratch)
        return out

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live[key] = size
        self.live_bytes += size
        self._reached(self.live_bytes)
        weakref.finalize(storage, self._freed, key)

    def _reached(self, size: int) -> None:
        """So many bytes are there at once."""
        self.peak_bytes = max(self.peak_bytes, size)

    def _freed(self, key: int) -> None:
        self.live_bytes -= self.live.pop(key)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (tensor.untyped_storage() for tensor in tensors_in(tree) if tensor.layout == torch.strided)


def _native(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether an operator of ours runs native code, by the type of what it reads first: bits and bytes always do."""
    return device.type == "cpu" and (dtype in SUFFIX or not dtype.is_floating_point) and status().native


@dataclass
class Account:
    """What one layer keeps for backward and multiplies, over all its calls in a step."""

    kept_bytes: int = 0
    forward_macs: int = 0
    backward_macs: int = 0


class Book(Ledger):
    """A ledger that knows whose turn it is: books kept storages and products to layers, by name.

    A storage belongs to the first layer that keeps it. In backward a layer is known by the sequence numbers
    of the autograd nodes that its forward made.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.accounts: dict[str, Account] = {}
        self.keepers: dict[int, str] = {}
        self._owner = ""
        self._marks: list[tuple[int, str]] = []

    @contextmanager
    def turn(self, owner: str) -> Iterator[None]:
        """What happens inside belongs to `owner`."""
        before = self._owner
        working_on(None)
        self._mark(owner)
        try:
            yield
        finally:
            working_on(None)
            self._mark(before)

    def _mark(self, owner: str) -> None:
        self._owner = owner
        self._marks.append((torch._C._autograd._get_sequence_nr(), owner))

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """The hook that saved tensors go through."""
        key = tensor.untyped_storage()._cdata
        if key in self.live:
            self.keepers.setdefault(key, self._inside() or self._owner)
        return tensor

    def settle(self, root: Any) -> None:
        """After the forward pass: name the keepers inside segments, and add up what is still alive."""
        for node in _nodes(root):
            segment = getattr(node, "segment", None)
            if isinstance(segment, Segment) and node.passes is None:
                inside = {call.name for call in segment.calls}
                kept = node.saved_tensors[len(segment.params):]
                for name, tensor in zip(node.kept_names, kept, strict=True):
                    key = tensor.untyped_storage()._cdata
                    if self.keepers.get(key) in inside:
                        self.keepers[key] = _keeper(segment, name)
        for key, owner in self.keepers.items():
            self.account(owner).kept_bytes += self.live.get(key, 0)

    def account(self, owner: str) -> Account:
        return self.accounts.setdefault(owner, Account())

    def _inside(self) -> str | None:
        """The layer that a host works on, where one segment spans several."""
        call = current_call()
        return None if call is None else call.name

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = super()._run(func, args, kwargs)
        count = PRODUCTS.get(func)
        if count is not None:
            node = torch._C._current_autograd_node()
            if node is None:
                self.account(self._inside() or self._owner).forward_macs += count(args, out)
            else:
                owner = self._inside() if current_passes() is not None else None
                self.account(owner or self._behind(node)).backward_macs += count(args, out)
        return out

    def _behind(self, node: Any) -> str:
        if isinstance(getattr(node, "segment", None), Segment):
            return self._inside() or self._owner
        at = bisect_right(self._marks, node._sequence_nr(), key=lambda mark: mark[0]) - 1
        return self._marks[at][1] if at >= 0 else self._owner

    def _freed(self, key: int) -> None:
        super()._freed(key)
        self.keepers.pop(key, None)


def _nodes(root: Any) -> Iterator[Any]:
    waiting, seen = [root], {root}
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _keeper(segment: Segment, kept: str) -> str:
    """Which layer of a segment keeps what its rule calls "role", "role:node" or "role:value:cell"."""
    _, _, rest = kept.partition(":")
    node, _, cell = rest.partition(":")
    for call in segment.calls:
        if (call.kind == "conv" and node in call.inputs) if cell else call.node == node:
            return call.name
    return segment.calls[0].name


def _matrix(at: int) -> Callable[[tuple[Any, ...], Any], int]:
    """MACs of a product whose left factor is argument `at`."""
    def count(args: tuple[Any, ...], out: Any) -> int:
        left, right = args[at], args[at + 1]
        return int(left.numel() * (right.shape[-1] if right.dim() > 1 else 1))
    return count


def _convolution(args: tuple[Any, ...], out: Any) -> int:
    moved = args[0] if args[6] else out
    return int(moved.numel() * args[1][0].numel())


def _convolution_backward(args: tuple[Any, ...], out: Any) -> int:
    gy, x, weight, *_, mask = args
    moved = x if args[7] else gy
    return int(moved.numel() * weight[0].numel()) * (int(mask[0]) + int(mask[1]))


def _grid_products(args: tuple[Any, ...], out: Any) -> int:
    g, _, _, x, weight, _, wants_input, _ = args
    return int(g.numel() * weight.shape[1]) * (int(wants_input) + int(x is not None))


def _binary(args: tuple[Any, ...], out: Any) -> int:
    """A product of two signs counts like any other; the last argument is the layer."""
    y = out if isinstance(out, torch.Tensor) else out[0]
    return int(y.numel()) * BinaryLayer(*args[-1]).products


def _adder(args: tuple[Any, ...], out: Any) -> int:
    """A difference that is added up counts like a product."""
    return int(out.numel() * args[1][0].numel())


def _adder_back(args: tuple[Any, ...], out: Any) -> int:
    return int(args[0].numel() * args[2][0].numel())


PRODUCTS: dict[Any, Callable[[tuple[Any, ...], Any], int]] = {
    aten.convolution.default: _convolution, aten.convolution_backward.default: _convolution_backward,
    aten.mm.default: _matrix(0), aten.bmm.default: _matrix(0), aten.mv.default: _matrix(0),
    aten.dot.default: _matrix(0), aten.addmm.default: _matrix(1), aten.baddbmm.default: _matrix(1),
    aten.addmv.default: _matrix(1),
    torch.ops.edgetune.grid_products.default: _grid_products,
    torch.ops.edgetune.binary_conv.default: _binary, torch.ops.edgetune.binary_conv_clip.default: _binary,
    torch.ops.edgetune.bit_weight_conv.default: _binary,
    torch.ops.edgetune.adder_conv.default: _adder, torch.ops.edgetune.adder_conv_input_gradient.default: _adder_back}
"""Multiply-accumulates of the operators that multiply and add up; elementwise work counts on neither side."""


class _Walk(fx.Interpreter):
    """Runs a graph node by node, so that functional calls, which belong to no module, have their turn too."""

    def __init__(self, model: nn.Module, graph: fx.Graph, names: dict[str, str], book: Book) -> None:
        super().__init__(model, graph=graph)
        self.names, self.book = names, book

    def run_node(self, n: fx.Node) -> Any:
        with self.book.turn(self.names.get(n.name, n.name)):
            return super().run_node(n)


@contextmanager
def _turns_of_modules(model: nn.Module, names: set[str], book: Book) -> Iterator[None]:
    """Give their turn to the layers inside of what could not be followed."""
    turns: list[ExitStack] = []

    def begin(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            turns.append(ExitStack())
            turns[-1].enter_context(book.turn(name))
        return hook

    def end(module: nn.Module, args: Any, out: Any) -> None:
        turns.pop().close()

    inside = [(name, module) for name, module in model.named_modules() if name in names]
    handles = [module.register_forward_pre_hook(begin(name)) for name, module in inside]
    handles += [module.register_forward_hook(end) for _, module in inside]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keep_book(model: nn.Module, graph: Graph, x: torch.Tensor, loss: Callable[[Any], torch.Tensor],
              device: torch.device) -> dict[str, Account]:
    """One forward and backward pass of `model` as it stands: what each layer keeps and multiplies."""
    book = Book(device)
    flow = routed_graph(model) or follow(model)[0]
    names = {call.node: call.name for call in graph.calls}
    unfollowed = {call.name for call in graph.calls if not call.followed or flow is None}
    with book, _turns_of_modules(model, unfollowed, book):
        with torch.autograd.graph.saved_tensors_hooks(book.pack, lambda tensor: tensor):
            out = model(x) if flow is None else _Walk(model, flow, names, book).run(x)
            with book.turn(LOSS):
                value = loss(out)
        del out
        if value.requires_grad:
            book.settle(value.grad_fn)
            value.backward()
    return book.accounts
