"""One list of cases a kernel: seeded shapes, types, layouts and values, as its arguments."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from edgetune.kernels import fallback, is_channels_last
from edgetune.kernels.bounded_format import packed_size
from kernels import adder_cases, binary_cases

CASES_EACH = 60
CHANNELS_LAST = torch.channels_last
# Borders, then shapes that fill whole vectors, tiles and more than one thread.
SHAPES = [(1, 1, 1, 1), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 5), (1, 3, 5, 0), (2, 3, 7, 9), (1, 5, 14, 14),
          (2, 16, 8, 32), (3, 70, 9, 21), (1, 2, 3, 1100), (1, 2, 40, 3), (2, 64, 56, 56), (1, 9, 33, 65)]


def _layout(x: Tensor, chosen: random.Random) -> Tensor:
    kind = chosen.choice(["contiguous", "last", "last", "unaligned", "sliced", "expanded"])
    if kind == "last":
        return x.contiguous(memory_format=CHANNELS_LAST)
    if kind == "unaligned" and x.numel():
        buffer = torch.empty(x.numel() + 1, dtype=x.dtype)
        return buffer[1:].view(x.shape).copy_(x)
    if kind == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    if kind == "expanded":
        return x[:, :, :1, :1].expand(x.shape) if min(x.shape) else x
    return x


def _values(shape: tuple[int, ...], chosen: random.Random, odd: bool) -> Tensor:
    x = torch.randn(shape) * 2
    if chosen.random() < 0.3:
        x = x.round()  # many ties, and values on the mask's bounds
    if odd and x.numel():
        flat = x.view(-1)
        for value in (float("nan"), float("inf"), float("-inf"), -0.0):
            flat[torch.randint(0, flat.numel(), (1 + flat.numel() // 50,))] = value
    return x


def _map(chosen: random.Random) -> Tensor:
    if chosen.random() < 0.5:
        shape = chosen.choice(SHAPES)
    else:
        shape = (chosen.randint(1, 3), chosen.randint(1, 40), chosen.randint(1, 30), chosen.randint(1, 40))
    dtype = chosen.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64])
    return _layout(_values(shape, chosen, chosen.random() < 0.4).to(dtype), chosen)


def _cell(chosen: random.Random) -> tuple[int, int]:
    one = chosen.choice([1, 2, 2, 3, 4, 4, 5, 7, 8, 9])
    large = chosen.randint(1, 40), chosen.randint(1, 50)
    return chosen.choice([(one, one), (one, chosen.randint(1, 9)), large])


def _bounds(chosen: random.Random) -> tuple[float, float]:
    return chosen.choice([(0.0, float("inf")), (0.0, 6.0), (-3.0, 3.0), (0.1, 1.7)])


def _dense_map(chosen: random.Random) -> Tensor:
    x = _map(chosen)
    return x if is_channels_last(x) else x.contiguous()


def patch_mean(chosen: random.Random) -> tuple[Any, ...]:
    return _map(chosen), *_cell(chosen), chosen.random() < 0.3


def patch_spread(chosen: random.Random) -> tuple[Any, ...]:
    x, cell = _map(chosen), _cell(chosen)
    v = fallback.patch_mean(x, *cell, by_channel=chosen.random() < 0.5)
    return v, *x.shape[2:], *cell, chosen.random() < 0.5


def mask_pack(chosen: random.Random) -> tuple[Any, ...]:
    return _map(chosen), *_bounds(chosen)


def mask_apply(chosen: random.Random) -> tuple[Any, ...]:
    g = _dense_map(chosen)
    return g, torch.randint(0, 256, ((g.numel() + 7) // 8,), dtype=torch.uint8)


def mask_count(chosen: random.Random) -> tuple[Any, ...]:
    return _map(chosen), *_bounds(chosen), *_cell(chosen)


def bits_count(chosen: random.Random) -> tuple[Any, ...]:
    g, bits = mask_apply(chosen)
    return bits, *g.shape, *_cell(chosen), is_channels_last(g)


def masked_patch_mean(chosen: random.Random) -> tuple[Any, ...]:
    return *mask_apply(chosen), *_cell(chosen)


def norm_backward(chosen: random.Random) -> tuple[Any, ...]:
    g = _dense_map(chosen)
    pixels = max(g.numel() // max(g.shape[1], 1), 1)
    g, x = g / pixels, _layout(torch.randn(g.shape), chosen).to(g.dtype)  # as of a loss that is a mean
    wide = torch.promote_types(g.dtype, torch.float32)
    weight, mean = torch.randn(2, g.shape[1], dtype=wide)
    bits = torch.randint(0, 256, ((g.numel() + 7) // 8,), dtype=torch.uint8)
    return (g, bits if chosen.random() < 0.7 else None, x if chosen.random() < 0.8 else None,
            weight if chosen.random() < 0.8 else None, mean, torch.rand(g.shape[1], dtype=wide) + 0.1, 1e-5,
            chosen.random() < 0.8)


def _weight_order(w: Tensor, chosen: random.Random) -> Tensor:
    turned = w.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    return chosen.choice([w, w.contiguous(memory_format=CHANNELS_LAST), turned])


def grid_products(chosen: random.Random) -> tuple[Any, ...]:
    groups, o, i = chosen.choice([(1, 24, 16), (1, 1, 1), (1, 40, 37), (3, 5, 7), (6, 2, 1), (9, 1, 1), (1, 500, 3),
                                  (1, 3, 270), (2, 8, 8)])
    n, p, q = chosen.choice([(2, 3, 5), (1, 1, 1), (0, 2, 2), (3, 4, 4), (1, 17, 16), (2, 7, 9)])
    kernel = chosen.choice([(1, 1), (3, 3), (3, 3), (5, 5), (2, 4), (1, 3)])
    dtype = chosen.choice([torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16])

    def drawn(*shape: int) -> Tensor:
        return (torch.randn(shape) / 8).to(dtype)

    def grid(channels: int) -> Tensor:
        return chosen.choice([drawn(channels, n, p, q).transpose(0, 1), drawn(n, channels, p, q)])

    factors = [drawn(p, q) if chosen.random() < 0.6 else None for _ in range(2)]
    x, wants_input = (None, True) if chosen.random() < 0.2 else (grid(groups * i), chosen.random() < 0.8)
    w = _weight_order(drawn(groups * o, i, *kernel), chosen)
    return grid(groups * o), *factors, x, w, groups, wants_input, chosen.random() < 0.7


def group_pack(chosen: random.Random) -> tuple[Any, ...]:
    x = _map(chosen) * chosen.choice([1, 1, 1, 0.01, 1e30, 1e-39])
    x = x.flatten()[5:] if chosen.random() < 0.3 else x
    return (x + chosen.choice([0, 0, 100]), chosen.choice([8, 4, 2]), chosen.choice([32, 96, 256, 256]),
            chosen.choice([0, 1, 2**63 - 1, -chosen.randrange(2**63)]), chosen.random() < 0.8)


def group_unpack(chosen: random.Random) -> tuple[Any, ...]:
    x, bits, group, *rest = group_pack(chosen)
    packed = fallback.group_pack(x.nan_to_num(0, 1, -1), bits, group, *rest)  # opcheck compares by ==
    return torch.stack([packed, packed])[0] if chosen.random() < 0.5 else packed, bits, group, x.numel()


def _geometry(x: Tensor, chosen: random.Random) -> tuple[int, ...]:
    while True:
        kernel = chosen.choice([(2, 2), (3, 3), (3, 3), (1, 3), (5, 4), (7, 2)])
        stride = chosen.choice([(2, 2), (1, 1), (2, 1), (3, 4)])
        pad = tuple(chosen.randint(0, k // 2) for k in kernel)
        dil = chosen.choice([(1, 1), (1, 1), (2, 1), (2, 3)])
        axes = zip(x.shape[2:], pad, dil, kernel, strict=True)
        if all(size + 2 * p > d * (k - 1) for size, p, d, k in axes):
            return *kernel, *stride, *pad, *dil


def max_pool(chosen: random.Random) -> tuple[Any, ...]:
    while True:
        x = _map(chosen)
        if min(x.shape) > 0:
            return x, *_geometry(x, chosen), chosen.random() < 0.5


def max_pool_backward(chosen: random.Random) -> tuple[Any, ...]:
    x, *geometry, ceil_mode = max_pool(chosen)
    y, index = fallback.max_pool(x, *geometry, ceil_mode)
    return _layout(torch.randn(y.shape).to(y.dtype), chosen), index, *x.shape[2:], *geometry


def bounded_sizes(chosen: random.Random) -> tuple[Any, ...]:
    while True:
        x = _map(chosen).nan_to_num(0, 1, -1).reshape(-1)[: chosen.choice([1, 255, 300, 3000, 3000, 40_000])]
        if x.numel() > 0:
            break
    kinds = [x, x.relu(), x + 5, x.double().cumsum(0).to(x.dtype), x * (x.double().cumsum(0) > 0), x * (x > 3), x * 0]
    bound = chosen.choice([0.0, 1e-7, 1e-5, 1e-3, 0.01, 0.3, 1e9])
    return _layout(chosen.choice(kinds).view(-1, 1, 1, 1), chosen), bound


def bounded_encode(chosen: random.Random) -> tuple[Any, ...]:
    x, bound = bounded_sizes(chosen)
    sizes = fallback.bounded_sizes(x, bound)
    return x, sizes, bound, packed_size(sizes)


def bounded_decode(chosen: random.Random) -> tuple[Any, ...]:
    arguments = bounded_encode(chosen)
    return fallback.bounded_encode(*arguments), arguments[0].numel()


MAKERS: dict[str, Callable[[random.Random], tuple[Any, ...]]] = {
    make.__name__: make for make in (patch_mean, patch_spread, mask_pack, mask_apply, mask_count, bits_count,
                                     masked_patch_mean, norm_backward, grid_products, group_pack, group_unpack,
                                     max_pool, max_pool_backward, bounded_sizes, bounded_encode, bounded_decode,
                                     binary_cases.sign_pack, binary_cases.sign_unpack, binary_cases.arrange_filters,
                                     binary_cases.binary_conv, binary_cases.binary_conv_clip,
                                     binary_cases.binary_conv_sign, binary_cases.bit_weight_conv,
                                     binary_cases.affine_clip, *adder_cases.ALL)}


def cases(name: str, count: int = CASES_EACH) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(seed, arguments) of each case of a kernel; a failing test prints the seed."""
    for number in range(count):
        seed = zlib.crc32(name.encode()) % 10_000 + number
        torch.manual_seed(seed)
        yield seed, MAKERS[name](random.Random(seed))


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The answers; the last of more than two is scratch, whose numbers nobody promises."""
    if isinstance(out, tuple):
        return out[:-1] if len(out) > 2 else out
    return (out,)


def call(name: str, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """The answers of an op, as torch calls it."""
    return as_tuple(getattr(torch.ops.edgetune, name)(*arguments))
