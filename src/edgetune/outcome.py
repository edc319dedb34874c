"""What operators give on meta tensors: asked once for arguments of one kind, and made again after that.

On meta a result is its shape, strides and type, and these follow from those of the arguments. Networks repeat their
layers and the planner its trials, while torch works most of these answers out in Python: remembering them is most of
the speed of a prediction.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

MOST = 1 << 16
"""Outcomes that are remembered; beyond that all are forgotten."""

Fact = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor."""


@dataclass(frozen=True)
class Outcome:
    """What each new tensor that an operator gives is (None: no tensor), whether it gives just one, and
    `scratch_bytes`, what it holds at its worst moment. Without `made` its result is its first argument, changed."""

    made: tuple[Fact | None, ...] | None
    single: bool
    scratch_bytes: int

    def again(self, first: Any) -> Any:
        """The same result: in new tensors on meta, or the first argument itself."""
        if self.made is None:
            return first
        made = tuple(None if fact is None else _empty(fact) for fact in self.made)
        return made[0] if self.single else made


_KNOWN: dict[Hashable, Outcome | None] = {}


def foreseen(func: Any, args: Any, kwargs: Any, place: Hashable, run: Callable[[], Any],
             scratch: Callable[[], int]) -> tuple[Any, int]:
    """What `func` gives for these meta tensors, and its scratch bytes.

    Where it was not asked before, `run` and `scratch` are; `place` is all else that the answers depend on. Views and
    results that share memory are computed each time.
    """
    if result_of(func) == "view":
        return run(), scratch()
    key = (func, place, _kind(args), _kind(tuple(kwargs.items())))
    known = _KNOWN.get(key)
    if known is not None:
        return known.again(args[0]), known.scratch_bytes
    out, held = run(), scratch()
    if key not in _KNOWN:
        if len(_KNOWN) >= MOST:
            _KNOWN.clear()
        _KNOWN[key] = _outcome(func, out, (args, kwargs), held)
    return out, held


@cache
def result_of(func: Any) -> Literal["new", "changed", "view"]:
    """Whether an operator gives new memory, its first argument with other numbers, or anything else."""
    schema = func._schema
    aliases = [value.alias_info for value in schema.returns]
    if not schema.is_mutable:
        return "new" if all(alias is None for alias in aliases) else "view"
    written = [value.alias_info is not None and value.alias_info.is_write for value in schema.arguments]
    in_place = written[0] and not any(written[1:]) and len(aliases) == 1 and func._schema.name.endswith("_")
    return "changed" if in_place and torch.Tag.inplace_view not in func.tags else "view"


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors of an operator's arguments or results, which nest in tuples, lists and dictionaries only."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from tensors_in(branch)
    elif isinstance(tree, dict):
        yield from tensors_in(tuple(tree.values()))


def _kind(tree: Any) -> Hashable:
    """All of an argument that an answer on meta can depend on."""
    if isinstance(tree, torch.Tensor):
        return tree.shape, tree.stride(), tree.dtype, tree.device.type
    if isinstance(tree, tuple | list):
        return tuple(map(_kind, tree))
    return type(tree), tree


def _outcome(func: Any, out: Any, given: Any, scratch_bytes: int) -> Outcome | None:
    """The outcome, if it is all that there is to the result; None for one that has to be computed each time."""
    if result_of(func) == "changed":
        return Outcome(None, True, scratch_bytes) if out is given[0][0] else None
    made = (out,) if isinstance(out, torch.Tensor) else out
    if not isinstance(made, tuple) or not all(tensor is None or _fills_its_storage(tensor) for tensor in made):
        return None
    before = {tensor.untyped_storage()._cdata for tensor in tensors_in(given)}
    storages = [tensor.untyped_storage()._cdata for tensor in made if tensor is not None]
    if len(set(storages) - before) < len(storages):
        return None
    facts = tuple(None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype) for tensor in made)
    return Outcome(facts, isinstance(out, torch.Tensor), scratch_bytes)


def _empty(fact: Fact) -> torch.Tensor:
    shape, strides, dtype = fact
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def _fills_its_storage(tensor: Any) -> bool:
    """Whether a value is a plain tensor on meta with as many bytes as one made anew."""
    if type(tensor) is not torch.Tensor or not tensor.is_meta or tensor.layout != torch.strided:
        return False
    twin = _empty((tensor.shape, tensor.stride(), tensor.dtype))
    return tensor.storage_offset() == 0 and twin.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
