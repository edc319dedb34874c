"""The error-bounded codec in plain torch: the same bytes as native/bounded_encode.c writes, for any device.

Blocks are rows (b 256), a group of chunks at a time. native/bounded.h describes the bytes.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetune.kernels.bounded_bits import Numbers, Reader, Writer, bytes_of, check_of, in_front, places, words_of
from edgetune.kernels.bounded_format import (
    BLOCK,
    CHUNK,
    ENTRY,
    HEADER,
    bound_of,
    broken,
    chunks_of,
    head_of,
    starts_of,
    steps_of,
    unfit_sizes,
)

MASKED, WIDE, NOTHING_SET, RAW, FIRST_SET = 16, 14, 15, 15 | 1 << 5, 16
PLAIN, ABOVE, AROUND, STEPS = range(4)
MOST_CELLS, MOST_WIDE, MOST_K, MOST_GAP_K = 2.0**12, 2.0**21, 23, 7
GROUP = 16
"""Chunks that are worked on at once."""


class _Blocks(NamedTuple):
    """How rows are written: all (b), but for the values' bits and the mask (b 256). `size` is in bytes."""

    bits: Tensor
    m: Tensor
    mask: Tensor
    first: Tensor
    wide: Tensor
    raw: Tensor
    base: Tensor
    base_bytes: Tensor
    mask_bytes: Tensor
    gaps: Numbers
    numbers: Numbers
    size: Tensor


def bounded_sizes(x: Tensor, bound: float) -> Tensor:
    flat = x.reshape(-1).float()
    blocks = torch.cat([_plan(part, bound).size for part in flat.split(GROUP * CHUNK)])
    return F.pad(blocks, (0, -blocks.numel() % (CHUNK // BLOCK))).view(-1, CHUNK // BLOCK).sum(1).int()


def bounded_encode(x: Tensor, sizes: Tensor, bound: float, size: int) -> Tensor:
    flat, starts = x.reshape(-1).float(), starts_of(sizes)
    head = head_of(flat.numel(), bound, size).to(x.device)
    if not torch.equal(sizes, bounded_sizes(flat, bound)) or starts[-1] != size:
        raise unfit_sizes()
    parts = [_write(_plan(part, bound)) for part in flat.split(GROUP * CHUNK)] if flat.numel() else []
    packed = torch.cat([head, head.new_zeros(ENTRY * sizes.numel()), *parts])
    edges = starts.tolist()
    checks = [check_of(packed[a:b], chunk) for chunk, (a, b) in enumerate(pairwise(edges))]
    entries = torch.stack([sizes.long(), sizes.new_tensor(checks, dtype=torch.int64)], 1)
    packed[HEADER : edges[0]] = bytes_of(entries.view(-1))
    packed[4:8] = bytes_of(sizes.new_tensor([check_of(packed[8 : edges[0]], 0)], dtype=torch.int64))
    return packed


def bounded_decode(packed: Tensor, count: int) -> Tensor:
    bound, chunks = bound_of(packed, count), chunks_of(count)
    first = HEADER + ENTRY * chunks
    if packed.numel() < first:
        raise broken("they end within the table of chunks")
    table = words_of(packed[HEADER:first], 4).view(chunks, 2)
    starts = starts_of(table[:, 0])
    if starts[-1] != packed.numel() or check_of(packed[8:first], 0) != words_of(packed[4:8], 4).item():
        raise broken("their table of chunks is damaged")
    edges, checks = starts.tolist(), table[:, 1].tolist()
    found = [check_of(packed[a:b], chunk) for chunk, (a, b) in enumerate(pairwise(edges))]
    bad = [chunk for chunk in range(chunks) if found[chunk] != checks[chunk]]
    out = packed.new_empty(chunks * CHUNK, dtype=torch.float32)
    for a in range(0, chunks if not bad else 0, GROUP):
        b = min(a + GROUP, chunks)
        good = _read(packed, starts[a : b + 1], out[a * CHUNK : b * CHUNK].view(b - a, CHUNK), count - a * CHUNK, bound)
        bad += (a + (~good).nonzero().flatten()).tolist()
    if bad:
        raise broken(f"chunk {bad[0]} of {chunks} is damaged")
    return out[:count]


def _measured(u: Tensor, n: Tensor) -> Numbers:
    u = torch.where(places(u) < n[:, None], u, 0)
    powers = torch.arange(1, 33, device=u.device)
    k = ((n[:, None] << powers) <= u.sum(1)[:, None]).sum(1) * (n > 0)
    high = (u >> k[:, None]).sum(1)
    return Numbers(u, n, k, (n * k + 7) // 8 + (n + high + 7) // 8)


def _zigzag(v: Tensor) -> Tensor:
    return torch.where(v < 0, -2 * v - 1, 2 * v)


def _folded(q: Tensor, n: Tensor, wide: Tensor) -> tuple[Numbers, Tensor, Tensor, Tensor]:
    """Cells q (b 256) in the form that takes the fewest bytes: the numbers, form, base and its bytes."""
    inside = places(q) < n[:, None]
    least = torch.where(inside, q, 2**40).amin(1)
    middle = torch.div((q * inside).sum(1), n.clamp(min=1), rounding_mode="floor")
    bases = (torch.zeros_like(n), least, middle, q[:, 0])
    before = torch.cat([q[:, :1], q[:, :-1]], 1)
    rows = (q, q - least[:, None], _zigzag(q - middle[:, None]), _zigzag(q - before))
    tried = [_measured(torch.where(inside, u, 0).clamp(min=0), n) for u in rows]
    form, base, base_bytes = torch.full_like(n, -1), bases[0], torch.zeros_like(n)
    best = tried[0]
    for number, other in enumerate(tried):
        own = torch.where(wide, 4, 2) if number else torch.zeros_like(n)
        better = (form < 0) | (other.size + own < best.size + base_bytes)
        better &= least >= 0 if number == PLAIN else (least != 0 if number == ABOVE else n >= 0)
        best = Numbers(*(torch.where(better[:, None] if a.dim() == 2 else better, a, b) for a, b in zip(other, best)))
        form, base = torch.where(better, number, form), torch.where(better, bases[number], base)
        base_bytes = torch.where(better, own, base_bytes)
    return best, form, base, base_bytes


def _gaps(mask: Tensor, m: Tensor) -> Numbers:
    """How many values lie between one change of the mask and the next, less one."""
    change = F.pad(mask[:, 1:] != mask[:, :-1], (1, 0)) & (places(mask) < m[:, None])
    at = in_front(change)
    return _measured(at - F.pad(at[:, :-1], (1, 0)) - 1, change.sum(1))


def _masked(mask: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Numbers]:
    """The values that are set (b), the bytes of the mask, its gaps."""
    n, gaps = mask.sum(1), _gaps(mask, m)
    octets = 1 + (m + 7) // 8
    short = 2 + gaps.size < octets
    size = torch.where(short, 2 + gaps.size, octets) * ((n > 0) & (n < m))
    return n, size, gaps._replace(n=gaps.n * short)


def _plan(flat: Tensor, bound: float) -> _Blocks:
    e, scale = steps_of(bound)
    x = F.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    m = (flat.numel() - places(x, len(x)) * BLOCK).clamp(max=BLOCK)
    bits = x.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    magnitude = bits & 0x7FFFFFFF
    cells = magnitude.amax(1).int().view(torch.float32) * torch.tensor(scale, dtype=torch.float32)
    some = magnitude.any(1) if e else bits.any(1)
    raw = some & ~(cells <= MOST_WIDE / 2) if e else some
    wide = (cells > MOST_CELLS) & ~raw & some
    mask = torch.where(raw[:, None], bits != 0, magnitude != 0)
    order = in_front(mask)
    steps = torch.where(wide, 2 * scale, scale).float()[:, None]
    q = (torch.where(raw[:, None], 0, x) * steps).floor().long().gather(1, order)
    n = mask.sum(1)
    numbers, form, base, base_bytes = _folded(torch.where(places(q) < n[:, None], q, 0), n, wide)
    n, mask_bytes, gaps = _masked(mask, m)
    size = 1 + wide.long() + base_bytes + mask_bytes + numbers.size
    again = some & (raw | (size > 4 * m))
    if bool((again & ~raw).any()):
        mask = torch.where(again[:, None], bits != 0, mask)
        n, mask_bytes, gaps = _masked(mask, m)
    plain = 4 * m
    mask_bytes = torch.where(again & (mask_bytes + 4 * n >= plain), 0, mask_bytes)
    first = form << 5 | torch.where(wide, WIDE, numbers.k) | torch.where(mask_bytes > 0, MASKED, 0)
    first = torch.where(again, RAW | torch.where(mask_bytes > 0, MASKED, 0), first)
    first = torch.where(some, first, NOTHING_SET)
    size = torch.where(again, 1 + torch.where(mask_bytes > 0, mask_bytes + 4 * n, plain), size)
    return _Blocks(bits, m, mask, first, wide & ~again & some, again, base, base_bytes, mask_bytes, gaps, numbers,
                   torch.where(some, size, 1))


def _write(b: _Blocks) -> Tensor:
    """The bytes of a group of blocks."""
    writer, every, coded = Writer(b.size), b.m > 0, (b.first != NOTHING_SET) & ~b.raw
    masked, bitmap = b.mask_bytes > 0, b.gaps.n == 0
    writer.put(b.first[:, None], 1, 8, every)
    writer.put(b.numbers.k[:, None], 1, 8, b.wide)
    writer.put(b.base[:, None], 1, 8 * b.base_bytes, coded)
    writer.put(b.gaps.n[:, None], 1, 8, masked)
    writer.put((b.gaps.k | b.mask[:, 0] * FIRST_SET)[:, None], 1, 8, masked & ~bitmap)
    writer.put_numbers(b.gaps, masked & ~bitmap)
    writer.put(b.mask.long(), b.m, 1, masked & bitmap)
    writer.put_numbers(b.numbers, coded)
    kept = b.mask | ~masked[:, None]
    count = torch.where(masked, b.mask.sum(1), b.m)
    writer.put(b.bits.gather(1, in_front(kept)), count, 32, b.raw)
    return writer.packed()


def _signed(v: Tensor, bits: int) -> Tensor:
    return v - ((v >> bits - 1) << bits)


def _unzigzag(u: Tensor) -> Tensor:
    return (u >> 1) ^ -(u & 1)


def _read_mask(reader: Reader, m: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """The mask (b 256), all of m where there is none, and in which rows that was right."""
    toggles = reader.get(1, 8, where, 1)[:, 0]
    runs = where & (toggles > 0)
    kind = reader.get(1, 8, runs, 1)[:, 0]
    k = kind & ~FIRST_SET
    good = k <= MOST_GAP_K
    gaps, right = reader.get_numbers(toggles, torch.where(good, k, 0), runs)
    at = (gaps.clamp(max=BLOCK) + 1).cumsum(1)
    used = places(at) < toggles[:, None] * runs[:, None]
    good &= right & ~(used & (at >= m[:, None])).any(1)
    flips = torch.zeros_like(at).scatter_add_(1, at.clamp(max=BLOCK - 1), used.long()).cumsum(1) + (kind > k)[:, None]
    bitmap = reader.get(m, 1, where & ~runs)
    mask = torch.where(runs[:, None], flips % 2 > 0, bitmap > 0) | ~where[:, None]
    return mask & (places(mask) < m[:, None]), good


def _read(packed: Tensor, starts: Tensor, out: Tensor, count: int, bound: float) -> Tensor:
    """Fill out (chunks CHUNK), of which `count` values count; returns in which chunks the bytes were right."""
    e, reader = steps_of(bound)[0], Reader(packed, starts[:-1])
    good = torch.ones_like(starts[:-1], dtype=torch.bool)
    for column in range(CHUNK // BLOCK):
        m = (count - places(good, len(good)) * CHUNK - column * BLOCK).clamp(0, BLOCK)
        values, right = _read_blocks(reader, m, e)
        out[:, column * BLOCK : (column + 1) * BLOCK] = values
        good &= right & (reader.at <= 8 * starts[1:])
        reader.at = torch.minimum(reader.at, 8 * starts[1:])
    return good & (reader.at == 8 * starts[1:])


def _read_blocks(reader: Reader, m: Tensor, e: float) -> tuple[Tensor, Tensor]:
    """Values (b 256) of one block in every row, and where their bytes were right."""
    some = m > 0
    first = reader.get(1, 8, some, 1)[:, 0]
    raw, masked = some & (first & ~MASKED == RAW), first & MASKED > 0
    coded = some & ~raw & (first != NOTHING_SET)
    wide = coded & (first & 15 == WIDE)
    k = torch.where(wide, reader.get(1, 8, wide, 1)[:, 0], first & 15)
    form = first >> 5
    good = ~coded | ((k <= MOST_K) & (form <= STEPS) & (first & 15 != NOTHING_SET))
    has_base = coded & (form != PLAIN)
    base = reader.get(1, torch.where(wide, 32, 16), has_base, 1)[:, 0]
    base = torch.where(wide, _signed(base, 32), _signed(base, 16))
    mask, right = _read_mask(reader, m, (raw | coded) & masked)
    n = mask.sum(1)
    good &= right & ((n > 0) | ~(raw | coded))
    u, right = reader.get_numbers(n, torch.where(good, k, 0), coded)
    good &= right
    bits = reader.get(n, 32, raw)
    steps = (base[:, None] + _unzigzag(u).cumsum(1))
    rows = {PLAIN: u, ABOVE: u + base[:, None], AROUND: _unzigzag(u) + base[:, None], STEPS: steps}
    q = torch.stack([torch.where((form == number)[:, None], row, 0) for number, row in rows.items()]).sum(0)
    cell = _signed(2 * q + 1 & 0xFFFFFFFF, 32).float() * torch.where(wide, e / 2, e).float()[:, None]
    packed_values = torch.where(raw[:, None], _signed(bits, 32).int().view(torch.float32), cell)
    place = (mask.long().cumsum(1) - 1).clamp(min=0)
    return torch.where(mask & (raw | coded)[:, None], packed_values.gather(1, place), 0), good
