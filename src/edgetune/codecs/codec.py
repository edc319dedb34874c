"""What a codec promises: bytes for a tensor, the tensor back, how many bytes, and how far off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from edgetune.errors import EdgetuneError


class Codec:
    """float x (n ...) <-> uint8 (bytes): the interface of what is kept between forward and backward, and in caches.

    A codec is its class with what it was made with; it holds no data. Shapes have the samples in front, and a
    sample's numbers in memory order: who calls brings them there.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    fixed: ClassVar[bool] = True
    """Whether the shape alone says how many bytes a tensor takes."""
    keeps_zeros: ClassVar[bool] = False
    """Whether a zero comes back as zero, and nothing else does: then a ReLU's mask can be read off."""

    def size(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape (n ...): exactly where `fixed`, else at most."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x (n ...) -> uint8 (bytes). What `refuse` complains of must not come here.

        On meta as many bytes as `size` says.
        """
        if x.is_meta:
            return x.new_empty(self.size(x.shape), dtype=torch.uint8)
        return self._encode(x)

    def decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """uint8 (bytes) -> float32 of `shape` (n ...). Raises EdgetuneError for bytes that are no such tensor's."""
        if self.fixed and packed.numel() != self.size(shape):
            raise EdgetuneError(
                f"{packed.numel()} bytes are no {'x'.join(map(str, shape))} numbers by codec {self.name}, which takes "
                f"{self.size(shape)}: read what was written, whole"
            )
        if packed.is_meta:
            return packed.new_empty(tuple(shape), dtype=torch.float32)
        return self._decode(packed, shape)

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        """What |x - decode(encode(x))| never exceeds, element by element."""
        raise NotImplementedError

    def refuse(self, x: torch.Tensor) -> str | None:
        """Why these values cannot be written, as "has values that ...", or None."""
        return None

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        raise NotImplementedError
