"""Codecs of fixed size: exactly, in half precision, or in eight bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from edgetune.codecs.codec import Codec


class Plain(Codec):
    """Codecs that write every number alike: `largest` is the greatest magnitude they take."""

    largest: ClassVar[float]

    def refuse(self, x: torch.Tensor) -> str | None:
        if self.exact or bool((x.abs() <= self.largest).all()):
            return None
        if not bool(x.isfinite().all()):
            return f"has values that are not finite, which {self.name} cannot hold"
        return f"has values as large as {float(x.abs().max()):.3g}, more than the {self.largest:g} of {self.name}"


class Float32(Plain):
    """The very bits, whatever they mean: 4 bytes a number, no error."""

    name = "float32"
    exact = True
    keeps_zeros = True
    largest = math.inf

    def size(self, shape: Sequence[int]) -> int:
        return 4 * math.prod(shape)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().contiguous().view(-1).view(torch.uint8)

    def _decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return _read(packed, torch.float32).reshape(tuple(shape))

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class Float16(Plain):
    """Half precision: 2 bytes a number, off by at most 2^-11 of it, or 2^-25 where it is tiny."""

    name = "float16"
    largest = 65504.0

    def size(self, shape: Sequence[int]) -> int:
        return 2 * math.prod(shape)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.float16).contiguous().view(-1).view(torch.uint8)

    def _decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return _read(packed, torch.float16).float().reshape(tuple(shape))

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        return (x.abs() * 2.0**-11).clamp(min=2.0**-25)


class Int8(Plain):
    """256 even steps between the least and the greatest value of each channel of a sample: off by half a step.

    A sample is written as the least value and the step of every channel (float32), then one byte a number. Where
    channels are small, as behind pooling, all of a sample share one scale.
    """

    name = "int8"
    largest = 2.0**126  # the distance between two values must be a float32, too
    SMALL = 16
    """Channels of fewer values share the scale of their sample."""

    def size(self, shape: Sequence[int]) -> int:
        return shape[0] * (8 * self._scales(shape[1:]) + math.prod(shape[1:]))

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        rows, low, step = self._scaled(x)
        codes = torch.where(step > 0, (rows - low) / step, 0).round().clamp(0, 255).to(torch.uint8)
        head = _rows(torch.stack([low, step], -1)).contiguous().view(torch.uint8)
        return torch.cat([head, _rows(codes)], 1).view(-1)

    def _decode(self, packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        count, numbers, scales = shape[0], math.prod(shape[1:]), self._scales(shape[1:])
        rows = packed.reshape(count, 8 * scales + numbers)
        low, step = _read(rows[:, : 8 * scales], torch.float32).reshape(count, scales, 1, 2).unbind(-1)
        codes = rows[:, 8 * scales :].reshape(count, scales, numbers // scales)
        return (low + codes * step).reshape(tuple(shape))

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


PLAIN: dict[str, Plain] = {codec.name: codec for codec in (Float32(), Float16(), Int8())}
