"""How many bytes a step moves: what every operator reads and writes, each counted once an operator.

With the multiply-accumulates this is the proxy for energy: on small devices fetching a value from memory takes far
more than multiplying it. What stays in a cache between two operators is counted as moved, on every side alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(TorchDispatchMode):
    """Adds up `moved_bytes` of the operators that run inside; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.moved_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = list(_tensors((args, kwargs))), list(_tensors(out))
        storages = {tensor.untyped_storage()._cdata for tensor in read}
        if func._schema.is_mutable or any(tensor.untyped_storage()._cdata not in storages for tensor in written):
            self.moved_bytes += sum(_bytes(tensor) for tensor in (*read, *written))
        return out


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    """What is behind a tensor; an expanded one is read from where it is stored."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
