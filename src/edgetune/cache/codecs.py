"""How features are written as bytes: exactly, in half precision, or in eight bits.

A codec says how many bytes a sample takes, writes, reads back, and bounds the error of every element. A new one is
a class and its entry in `CODECS`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch


class Codec:
    """float32 (n ...) <-> uint8 (n size), sample by sample."""

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    largest: ClassVar[float]
    """The largest magnitude that can be written."""

    def size(self, shape: Sequence[int]) -> int:
        """Bytes of one sample of this shape."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """x (n ...) -> uint8 (n size). What `refuse` complains of must not come here."""
        raise NotImplementedError

    def decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """uint8 (n size) -> float32 (n *shape)."""
        raise NotImplementedError

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        """What |x - decode(encode(x))| never exceeds, element by element."""
        raise NotImplementedError

    def refuse(self, x: torch.Tensor) -> str | None:
        """Why these values cannot be written, or None."""
        if self.exact or bool((x.abs() <= self.largest).all()):
            return None
        if not bool(x.isfinite().all()):
            return f"has features that are not finite, which {self.name} cannot hold"
        return f"has features as large as {float(x.abs().max()):.3g}, more than the {self.largest:g} of {self.name}"


class Float32(Codec):
    """The very bits, whatever they mean: 4 bytes a number, no error."""

    name = "float32"
    exact = True
    largest = math.inf

    def size(self, shape: Sequence[int]) -> int:
        return 4 * math.prod(shape)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return _rows(x).contiguous().view(torch.uint8)

    def decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return _read(packed, torch.float32).reshape(len(packed), *shape)

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class Float16(Codec):
    """Half precision: 2 bytes a number, off by at most 2^-11 of it, or 2^-25 where it is tiny."""

    name = "float16"
    largest = 65504.0

    def size(self, shape: Sequence[int]) -> int:
        return 2 * math.prod(shape)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return _rows(x).to(torch.float16).view(torch.uint8)

    def decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return _read(packed, torch.float16).float().reshape(len(packed), *shape)

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        return (x.abs() * 2.0**-11).clamp(min=2.0**-25)


class Int8(Codec):
    """256 even steps between the least and the greatest value of each channel of a sample: off by half a step.

    A sample is written as the least value and the step of every channel (float32), then one byte a number. Where
    channels are small, as behind pooling, all of a sample share one scale.
    """

    name = "int8"
    largest = 2.0**126  # the distance between two values must be a float32, too
    SMALL = 16
    """Channels of fewer values share the scale of their sample."""

    def size(self, shape: Sequence[int]) -> int:
        return 8 * self._scales(shape) + math.prod(shape)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        rows, low, step = self._scaled(x)
        codes = torch.where(step > 0, (rows - low) / step, 0).round().clamp(0, 255).to(torch.uint8)
        head = _rows(torch.stack([low, step], -1)).contiguous().view(torch.uint8)
        return torch.cat([head, _rows(codes)], 1)

    def decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        scales = self._scales(shape)
        low, step = _read(packed[:, : 8 * scales], torch.float32).reshape(len(packed), scales, 1, 2).unbind(-1)
        codes = packed[:, 8 * scales :].reshape(len(packed), scales, math.prod(shape) // scales)
        return (low + codes * step).reshape(len(packed), *shape)

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        """Half a step, and what rounding to float32 adds on the way: 2^-20 of the largest value."""
        rows, _, step = self._scaled(x)
        rounding = 2.0**-20 * rows.abs().amax(2, keepdim=True) + 2.0**-140
        return (0.5 * step + rounding).expand_as(rows).reshape(x.shape)

    def _scaled(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scales = self._scales(x.shape[1:])
        rows = x.float().reshape(len(x), scales, x.shape[1:].numel() // scales)
        low, high = rows.aminmax(dim=2, keepdim=True)
        return rows, low, (high - low) / 255

    def _scales(self, shape: Sequence[int]) -> int:
        return shape[0] if len(shape) > 1 and math.prod(shape[1:]) >= self.SMALL else 1


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(n ...) -> (n numbers of a sample)."""
    return x.reshape(len(x), x.shape[1:].numel())


def _read(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as numbers, in memory of their own: within a longer record they need not lie where numbers have to."""
    return torch.empty(packed.shape, dtype=torch.uint8, device=packed.device).copy_(packed).view(dtype)


CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float32(), Float16(), Int8())}
