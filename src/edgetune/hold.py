"""Any network, as it stands: what autograd keeps from forward to backward is written by a codec.

    with hold(model, COMET()) as held:
        out = model(x)
    criterion(out, y).backward()

Nothing is traced or replaced: torch's hooks for saved tensors see what every operation keeps, also those of custom
functions, of attention, and of norms that learn from the batch. The forward pass is the network's own, but for random
numbers: a codec that rounds by chance draws from torch's generator between a network's dropouts.

What is left as it is: parameters and buffers, their copies in lower precision that autocast makes, and the model's
inputs (whoever calls holds them anyway); integers, masks, complex numbers and float64; values of at most 1 KiB; what
takes no more than a sixteenth of a value kept just before (a norm's mean and deviation, attention's log-sums: all that
they belong to depends on them); what a codec refuses, such as numbers that are not finite; and what would not become
smaller. What several operations keep of one memory is written once, and read once where they read it in turn.

The error
    A layer that is not ours has no law that says how far its gradient is off, and a value is written before it is
    known who reads it: COMET stays at its `start`, a bound in root mean squares of the values, and learns nothing.
    Where a weight's gradient is linear in what is kept (linear layers, convolutions) that puts on it the noise that
    the page of COMET states, with zero mean; or that of LowBit. Whatever reads slopes or products of kept values (GELU,
    softmax, norms, attention) passes an error on to all gradients in front of it, and over many layers these add up.
    Masks of ReLUs are exact, with a bit a value where the codec does not keep zeros. Slopes that are read off a sign in
    an input (ReLU6, leaky ReLU) are exact with COMET only, and what looks for equal numbers (amax) divides by zero.
    Compute the loss outside of `hold`, so that the gradient of the output is exact.

Memory that is changed in place is told apart by torch's version counters, so not where `.data` is written to. Backward
of backward goes through, with the same errors. `torch.compile` decides by itself what is kept.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from edgetune import kernels
from edgetune.codecs import Codec
from edgetune.contract import CodedMethod
from edgetune.errors import EdgetuneError
from edgetune.hosts.coded import SMALL_BYTES
from edgetune.outcome import tensors_in

WRITTEN = frozenset({torch.float32, torch.float16, torch.bfloat16})
"""The types that are written."""
STATISTIC = 16
"""How many times smaller than one of the `NEARBY` values before it a value has to be to be left as it is."""
NEARBY = 4
SHARE = 4
"""A part of a written value that is more times smaller is written for itself, as reading the whole would not pay."""


@contextmanager
def hold(model: nn.Module, how: CodedMethod | Codec) -> Iterator[Held]:
    """Inside, what forward passes keep for backward is written as `how` says: a method such as COMET() or LowBit(),
    or a codec. Backward passes may run inside or outside, more than once where the graph is retained; they raise
    EdgetuneError where a parameter, or what else is left as it is, has been changed in place since."""
    held = Held(model, how)
    handle = model.register_forward_pre_hook(held.leave_inputs, with_kwargs=True)
    try:
        with torch.autograd.graph.saved_tensors_hooks(held.pack, held.unpack):
            yield held
    finally:
        handle.remove()


class Held:
    """What is kept at the moment; it lets go of each value when autograd does."""

    def __init__(self, model: nn.Module, how: CodedMethod | Codec) -> None:
        self._how, self._model = how, model
        self._memories = weakref.WeakValueDictionary[int, _Memory]()
        self._written = weakref.WeakSet[_Written]()
        self._plain = weakref.WeakKeyDictionary[_Plain, _Memory]()
        self._recent, self._open = deque[int](maxlen=NEARBY), list[weakref.ref[_Written]]()
        self._left: list[_Memory] = []
        self._leave([*model.parameters(), *model.buffers()])

    @property
    def kept_bytes(self) -> int:
        """Bytes kept now; without parameters, buffers and the model's inputs."""
        plain = {kept.tensor.untyped_storage()._cdata: kept.tensor.untyped_storage().nbytes() for kept in self._plain}
        return sum(written.nbytes for written in self._written) + sum(plain.values())

    @property
    def plain_bytes(self) -> int:
        """Bytes that torch would keep now of the same values: the memories in which they lay."""
        return sum(memory.nbytes for memory in {*(each.memory for each in self._written), *self._plain.values()})

    def leave_inputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook in front of the model's forward: what nothing was computed for stays as it is."""
        self._leave([x for x in tensors_in((args, kwargs)) if x.grad_fn is None])

    def pack(self, x: torch.Tensor) -> _Plain | _View:
        """What autograd holds in place of x."""
        if not _has_memory(x):
            return _Plain(x.detach())
        memory = self._memory(x)
        if self._is_given(x, memory):
            return _Plain(x.detach())
        if x.dtype not in WRITTEN or x.is_neg() or x.numel() == 0 or memory.plain:
            return self._as_it_is(x, memory)
        rows, place = _laid_out(x)
        written = next((each for each in memory.written if each.place.has(place)), None)
        written = written or self._write(rows, place, memory)
        self._recent.append(rows.numel() * x.element_size())
        if written is None:
            return self._as_it_is(x, memory)
        strides = x.stride() if written.place.gaps is None else _closed(rows, x)
        return written.view(x.shape, strides, place.start - written.place.start)

    def unpack(self, kept: _Plain | _View) -> torch.Tensor:
        """x, or what came back of it."""
        if isinstance(kept, _Plain):
            return kept.read()
        for reference in self._open:  # one value at a time stays decoded for those that follow
            last = reference()
            if last is not None and last is not kept.written:
                last.open = None
        self._open = [weakref.ref(kept.written)]
        return kept.read()

    def _memory(self, x: torch.Tensor) -> _Memory:
        storage = x.untyped_storage()
        memory = self._memories.get(storage._cdata)
        if memory is None or memory.storage() is not storage:  # an address may be used again
            memory = self._memories[storage._cdata] = _Memory(weakref.ref(storage), storage.nbytes())
        return memory

    def _leave(self, tensors: list[torch.Tensor]) -> None:
        given = [self._memory(x) for x in tensors if _has_memory(x)]
        for memory in given:
            memory.given = True
        self._left = [memory for memory in self._left if memory.storage() is not None] + given

    def _is_given(self, x: torch.Tensor, memory: _Memory) -> bool:
        """Whether x is a parameter, a buffer, an input, or what autocast made of a parameter."""
        base = x if x._base is None else x._base
        if memory.given or isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad):
            return True
        return base.dtype in (torch.float16, torch.bfloat16) and any(
            p.shape == base.shape and torch.equal(p.to(base.dtype), base) for p in self._model.parameters())

    def _as_it_is(self, x: torch.Tensor, memory: _Memory) -> _Plain:
        kept = _Plain(x.detach())
        memory.plain.add(kept)
        self._plain[kept] = memory
        return kept

    def _write(self, rows: torch.Tensor, place: _Place, memory: _Memory) -> _Written | None:
        """The values (n ...), in memory order, written; None if they are to stay as they are."""
        size = rows.numel() * rows.element_size()
        written = None
        if size > SMALL_BYTES and STATISTIC * size > max(self._recent, default=0):
            written = self._coded(rows.contiguous(), place, memory)
        if written is None and 2 * size <= memory.nbytes:  # a small part does not keep the whole
            written = _Written(place, memory, rows.clone(memory_format=torch.contiguous_format), rows.shape)
        if written is not None:
            memory.written.add(written)
            self._written.add(written)
        return written

    def _coded(self, rows: torch.Tensor, place: _Place, memory: _Memory) -> _Written | None:
        x = rows.float()
        codec = self._how if isinstance(self._how, Codec) else self._how.codec(x, {})
        if codec.refuse(x) is not None:
            return None
        mask = None if codec.keeps_zeros or not _is_rectified(x) else kernels.mask_pack(x, 0.0, torch.inf)
        packed = codec.encode(x)
        if packed.untyped_storage()._cdata == rows.untyped_storage()._cdata:  # the very memory, seen as bytes
            packed = packed.clone()
        written = _Written(place, memory, packed, rows.shape, codec, mask)
        return written if written.nbytes <= min(rows.numel() * rows.element_size(), memory.nbytes) else None


class _Place(NamedTuple):
    """Which numbers of a memory, and when: all from `start` to before `stop`, or with gaps as many as `numbers`, as
    sizes and strides say."""

    version: int
    dtype: torch.dtype
    start: int
    stop: int
    numbers: int
    gaps: tuple[tuple[int, ...], tuple[int, ...]] | None

    def has(self, other: _Place) -> bool:
        """Whether the other's numbers are among these, and not too few of them."""
        if self.gaps is not None:
            return self == other
        inside = self[:2] == other[:2] and self.start <= other.start and other.stop <= self.stop
        return inside and SHARE * other.numbers >= self.numbers


@dataclass(eq=False)
class _Memory:
    """One storage, known for as long as something of it is kept."""

    storage: weakref.ref[torch.UntypedStorage]
    nbytes: int
    given: bool = False
    plain: weakref.WeakSet[_Plain] = field(default_factory=weakref.WeakSet)
    written: weakref.WeakSet[_Written] = field(default_factory=weakref.WeakSet)


class _Plain:
    """A tensor as it is; with the hooks in place torch does not look whether it was changed, so this does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    @property
    def changed(self) -> bool:
        return self.tensor._version != self.version

    def read(self) -> torch.Tensor:
        if self.changed:
            raise EdgetuneError(f"a tensor of shape {tuple(self.tensor.shape)} that backward needs was changed in "
                                "place after the forward pass: run backward first, or change a copy")
        return self.tensor


@dataclass(eq=False)
class _Written:
    """Values of one memory; `packed` by the codec, or the values themselves without one. `mask` has a bit for each
    that is above zero, where all others are zero."""

    place: _Place
    memory: _Memory
    packed: torch.Tensor
    shape: torch.Size
    codec: Codec | None = None
    mask: torch.Tensor | None = None
    views: weakref.WeakSet[_View] = field(default_factory=weakref.WeakSet)
    waiting: weakref.WeakSet[_View] = field(default_factory=weakref.WeakSet)
    open: _Plain | None = None

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + (0 if self.mask is None else self.mask.nbytes)

    def view(self, shape: torch.Size, strides: tuple[int, ...], offset: int) -> _View:
        kept = _View(self, shape, strides, offset)
        self.views.add(kept)
        return kept

    def read(self, view: _View) -> torch.Tensor:
        """The values, decoded once for all views that still wait for them."""
        values = self.open
        if values is None or values.changed:  # a custom function may have written into what it was given
            values, self.waiting = _Plain(self._decoded()), weakref.WeakSet(self.views)
        self.waiting.discard(view)
        self.open = values if self.waiting else None
        return values.tensor

    def _decoded(self) -> torch.Tensor:
        if self.codec is None:
            return self.packed.clone()
        values = self.codec.decode(self.packed, self.shape).to(self.place.dtype)
        if self.mask is None:
            return values
        return kernels.mask_apply(values.clamp(min=torch.finfo(values.dtype).tiny), self.mask)


@dataclass(eq=False)
class _View:
    """A saved tensor: how it lies in what was written."""

    written: _Written
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int

    def read(self) -> torch.Tensor:
        return self.written.read(self).as_strided(self.shape, self.strides, self.offset)


def _has_memory(x: torch.Tensor) -> bool:
    """Whether x is an ordinary tensor: no subclass with a life of its own, not sparse, not on meta."""
    return type(x) in (torch.Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_meta


def _is_rectified(x: torch.Tensor) -> bool:
    return bool((x >= 0).all()) and bool((x == 0).any())


def _laid_out(x: torch.Tensor) -> tuple[torch.Tensor, _Place]:
    """The values of x (n ...) in memory order, each once, and their place."""
    core = x.as_strided([1 if stride == 0 else size for size, stride in zip(x.shape, x.stride())], x.stride())
    rows, start = core.permute(_memory_order(core)), int(core.storage_offset())
    stop = start + 1 + sum((size - 1) * stride for size, stride in zip(rows.shape, rows.stride()))
    gaps = None if rows.is_contiguous() else (tuple(core.shape), core.stride())
    return rows, _Place(x._version, x.dtype, start, stop, rows.numel(), gaps)


def _closed(rows: torch.Tensor, x: torch.Tensor) -> tuple[int, ...]:
    """The strides of x over its values without the gaps, as `rows` lie when they are contiguous."""
    order = _memory_order(x)
    closed = torch.empty(rows.shape, device="meta").permute([order.index(axis) for axis in range(x.dim())])
    return closed.expand(x.shape).stride()


def _memory_order(x: torch.Tensor) -> list[int]:
    """The axes from the slowest to the fastest; one of a single number stays behind the axis in front of it."""
    strides, last = [], float("inf")
    for size, stride in zip(x.shape, x.stride()):
        last = stride if size > 1 and stride else last
        strides.append(last)
    return sorted(range(x.dim()), key=lambda axis: -strides[axis])
