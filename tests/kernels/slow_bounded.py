"""The error-bounded codec value by value, written from the description in native/bounded.h alone."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK, CHUNK = 256, 8192
ODD, WORD = 0x9E3779B97F4A7C15, 2**64
Bits = list[int]


def _bits(value: int, width: int) -> Bits:
    return [value >> place & 1 for place in range(width)]


def _whole(bits: Bits) -> bytes:
    bits = bits + [0] * (-len(bits) % 8)
    return bytes(sum(bit << place for place, bit in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8))


def _rice(numbers: Sequence[int]) -> tuple[int, bytes]:
    k = max(int(math.log2(sum(numbers) / len(numbers))), 0) if sum(numbers) else 0
    low = [bit for u in numbers for bit in _bits(u, k)]
    high = [bit for u in numbers for bit in [0] * (u >> k) + [1]]
    return k, _whole(low) + _whole(high)


def _zigzag(v: int) -> int:
    return 2 * v if v >= 0 else -2 * v - 1


def _mask(mask: Bits) -> bytes:
    changes = [i for i in range(1, len(mask)) if mask[i] != mask[i - 1]]
    k, written = _rice([b - a - 1 for a, b in zip([0, *changes], changes)])
    plain = b"\0" + _whole(mask)
    runs = bytes([len(changes), k | mask[0] << 4]) + written
    return runs if len(runs) < len(plain) else plain


def _raw(x: np.ndarray) -> bytes:
    words = [int(word) for word in x.view(np.uint32)]
    mask = [int(word != 0) for word in words]
    kept = b"".join(struct.pack("<I", word) for word in words if word)
    if all(mask) or len(_mask(mask) + kept) >= 4 * len(x):
        return bytes([15 | 1 << 5]) + b"".join(struct.pack("<I", word) for word in words)
    return bytes([15 | 1 << 5 | 16]) + _mask(mask) + kept


def _forms(cells: list[int], wide: bool) -> Iterator[tuple[int, bytes, list[int]]]:
    least, middle, packing = min(cells), sum(cells) // len(cells), "<i" if wide else "<h"
    if least >= 0:
        yield 0, b"", cells
    if least != 0:
        yield 1, struct.pack(packing, least), [q - least for q in cells]
    yield 2, struct.pack(packing, middle), [_zigzag(q - middle) for q in cells]
    yield 3, struct.pack(packing, cells[0]), [_zigzag(q - p) for p, q in zip([cells[0], *cells], cells)]


def _block(x: np.ndarray, e: np.float32, scale: np.float32) -> bytes:
    magnitudes = x.view(np.uint32) & 0x7FFFFFFF
    if not (magnitudes.any() if e else x.view(np.uint32).any()):
        return bytes([15])
    with np.errstate(all="ignore"):
        most = magnitudes.max().view(np.float32) * scale
    if e == 0 or not most <= 2**20:
        return _raw(x)
    wide = bool(most > 2**12)
    with np.errstate(under="ignore"):
        cells = [math.floor(value * (scale * np.float32(2) if wide else scale)) for value in x if value != 0]
    mask = [int(value != 0) for value in x]
    best = b""
    for form, base, numbers in _forms(cells, wide):
        k, written = _rice(numbers)
        kind = form << 5 | (0 if all(mask) else 16)
        first = bytes([kind | 14, k] if wide else [kind | k])
        made = first + base + (b"" if all(mask) else _mask(mask)) + written
        best = made if not best or len(made) < len(best) else best
    return best if len(best) <= 4 * len(x) else _raw(x)


def _steps(bound: float) -> tuple[np.float32, np.float32]:
    if bound < 2.0**-100:
        return np.float32(0), np.float32(0)
    wanted = min(bound, 2.0**120) * (1 - 2.0**-9)
    e = np.float32(wanted)
    e = e if float(e) <= wanted else np.nextafter(e, np.float32(0))
    return e, np.float32(0.5 / float(e))


def _chunks(x: Tensor, bound: float) -> list[bytes]:
    flat = x.reshape(-1).float().numpy()
    steps = _steps(bound)
    blocks = [_block(flat[i : i + BLOCK], *steps) for i in range(0, len(flat), BLOCK)]
    return [b"".join(blocks[i : i + CHUNK // BLOCK]) for i in range(0, len(blocks), CHUNK // BLOCK)]


def _check(data: bytes, seed: int) -> int:
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    total = (sum(word * pow(ODD, i + 1, WORD) for i, word in enumerate(words)) + seed + 6 + len(data)) * ODD % WORD
    return (total ^ total >> 29) * ODD % WORD >> 32


def slow_bounded_sizes(x: Tensor, bound: float) -> Tensor:
    return torch.tensor([len(chunk) for chunk in _chunks(x, bound)], dtype=torch.int32)


def slow_bounded_encode(x: Tensor, sizes: Tensor, bound: float, size: int) -> Tensor:
    chunks = _chunks(x, bound)
    table = b"".join(struct.pack("<II", len(chunk), _check(chunk, i)) for i, chunk in enumerate(chunks))
    rest = struct.pack("<QdQ", x.numel(), bound, size) + table
    made = b"ETB1" + struct.pack("<I", _check(rest, 0)) + rest + b"".join(chunks)
    return torch.tensor(list(made), dtype=torch.uint8)


class _Bits:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, 8 * at

    def number(self, width: int) -> int:
        value = sum((self.data[i // 8] >> i % 8 & 1) << i - self.at for i in range(self.at, self.at + width))
        self.at += width
        return value

    def signed(self, width: int) -> int:
        value = self.number(width)
        return value - (value >> width - 1 << width)

    def end(self) -> None:
        self.at += -self.at % 8

    def rice(self, n: int, k: int) -> list[int]:
        low = [self.number(k) for _ in range(n)]
        self.end()
        for i in range(n):
            while not self.number(1):
                low[i] += 1 << k
        self.end()
        return low

    def mask(self, m: int) -> Bits:
        changes = self.number(8)
        if changes == 0:
            found = [self.number(1) for _ in range(m)]
            self.end()
            return found
        k, first, _ = self.number(4), self.number(1), self.end()
        runs = [gap + 1 for gap in self.rice(changes, k)]
        runs.append(m - sum(runs))
        return [(first + i) % 2 for i, run in enumerate(runs) for _ in range(run)]


def _values(bits: _Bits, m: int, e: np.float32) -> list[float]:
    k, masked, form, _ = bits.number(4), bits.number(1), bits.number(2), bits.end()
    if k == 15 and form == 0:
        return [0.0] * m
    if k == 15:
        mask = bits.mask(m) if masked else [1] * m
        return [struct.unpack("<f", struct.pack("<I", bits.number(32)))[0] if bit else 0.0 for bit in mask]
    wide = k == 14
    k = bits.number(8) if wide else k
    base = bits.signed(32 if wide else 16) if form else 0
    mask = bits.mask(m) if masked else [1] * m
    numbers = bits.rice(sum(mask), k)
    back = [u // 2 if u % 2 == 0 else -(u + 1) // 2 for u in numbers]
    cells = {0: numbers, 1: [u + base for u in numbers], 2: [v + base for v in back],
             3: [base + int(step) for step in np.cumsum(back)]}[form]
    left = iter(cells)
    half = e / np.float32(2) if wide else e
    return [float(np.float32(2 * next(left) + 1) * half) if bit else 0.0 for bit in mask]


def slow_bounded_decode(packed: Tensor, count: int) -> Tensor:
    data = bytes(packed.tolist())
    _, bound, size = struct.unpack("<QdQ", data[8:32])
    assert size == len(data)
    chunks = -(-count // CHUNK)
    bits, out = _Bits(data, 32 + 8 * chunks), list[float]()
    while len(out) < count:
        room = min(BLOCK, CHUNK - len(out) % CHUNK, count - len(out))
        out += _values(bits, room, _steps(bound)[0])
    assert bits.at == 8 * size
    return torch.tensor(out, dtype=torch.float32)
