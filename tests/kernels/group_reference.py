"""group_pack and group_unpack, one element after the other, in exact fractions and whole numbers."""

from __future__ import annotations

import struct
from fractions import Fraction

import torch
from torch import Tensor

WORD = 2**32 - 1


def _memory_order(x: Tensor) -> list[float]:
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.float().flatten().tolist()


def _rounded(value: Fraction | float) -> Fraction:
    """To float32: through float64, whose 29 more bits all but never change what comes of it."""
    return Fraction(struct.unpack("<f", struct.pack("<f", float(value)))[0])


def _bfloat16_upwards(value: Fraction) -> Fraction:
    bits = struct.unpack("<I", struct.pack("<f", float(value)))[0]
    return Fraction(struct.unpack("<f", struct.pack("<I", (bits + 0xFFFF) // 2**16 * 2**16))[0])


def slow_noise(seed: int, group: int, place: int) -> int:
    """What is drawn for one element: 0..65535."""
    z = (seed + (group + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    pair, half = place // 16, place // 8 % 2
    h = (pair * 8 + place % 8) ^ (z & WORD)
    h = (h ^ h >> 16) * 0x21F0AAAD & WORD
    h = (h ^ h >> 15) + (z >> 32) & WORD
    h = h * 0xD35A2D97 & WORD
    h ^= h >> 15
    return h >> 16 if half else h & 0xFFFF


def _scale(values: list[float], bits: int) -> tuple[Fraction, Fraction] | None:
    """Least value and step, or None where the group can't be written."""
    if not all(abs(value) <= 2.0**126 for value in values):
        return None
    low, high = Fraction(min(values)), Fraction(max(values))
    if low == high:
        return low, Fraction(0)
    step = _rounded(_rounded(high - low) * _rounded(Fraction(1, 2**bits - 1)))
    return low, _bfloat16_upwards(max(step, Fraction(1, 2**110)))


def _code(value: float, low: Fraction, step: Fraction, bits: int, noise: int) -> int:
    if step == 0:
        return 0
    place = _rounded(_rounded(Fraction(value) - low) * _rounded(65536 / step))
    return (min(round(place), (2**bits - 1) * 65536) + noise) // 65536


def slow_group_pack(x: Tensor, bits: int, group: int, seed: int, stochastic: bool = True) -> Tensor:
    values = _memory_order(x)
    rows = [values[at : at + group] for at in range(0, len(values), group)]
    scales = [_scale(row, bits) for row in rows]
    nan = struct.pack("<I", 0x7FC00000)
    least = b"".join(struct.pack("<f", scale[0]) if scale else nan for scale in scales)
    steps = b"".join(struct.pack("<f", scale[1])[2:] if scale else nan[2:] for scale in scales)
    tile = 64 // bits
    codes = bytearray(8 * ((len(values) + tile - 1) // tile))
    for number, (row, scale) in enumerate(zip(rows, scales, strict=True)):
        for place, value in enumerate(row if scale else []):
            noise = slow_noise(seed, number, place) if stochastic else 32768
            at = number * group + place
            codes[at // tile * 8 + at % 8] |= _code(value, *scale, bits, noise) << at % tile // 8 * bits
    return torch.tensor(list(least + steps + codes), dtype=torch.float64)


def slow_group_unpack(packed: Tensor, bits: int, group: int, elements: int) -> Tensor:
    raw, scales, tile = bytes(packed.tolist()), (elements + group - 1) // group, 64 // bits
    out = []
    for at in range(elements):
        number = at // group
        low = struct.unpack_from("<f", raw, 4 * number)[0]
        step = struct.unpack("<f", b"\0\0" + raw[4 * scales + 2 * number :][:2])[0]
        byte = raw[6 * scales + at // tile * 8 + at % 8]
        out.append(low + step * (byte >> at % tile // 8 * bits & 2**bits - 1))
    return torch.tensor(out, dtype=torch.float64)
