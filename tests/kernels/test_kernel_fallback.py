"""The fallback against slow loops in float64, over the case lists."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgetune.kernels import fallback, is_channels_last
from edgetune.kernels.geometry import memory_format
from kernels import binary_reference, group_reference, slow_adder
from kernels.kernel_cases import MAKERS, as_tuple, cases
from kernels.slow_bounded import slow_bounded_decode, slow_bounded_encode, slow_bounded_sizes

SMALL = 20_000  # elements: loops in Python are slow
SLOWER = {"max_pool_backward": 3000, "mask_pack": 3000, "group_pack": 3000, "group_unpack": 3000,
          "bounded_decode": 80_000, "binary_conv": 2000, "binary_conv_clip": 2000, "binary_conv_sign": 2000}
SLOW_BOUNDED = slow_bounded_sizes, slow_bounded_encode, slow_bounded_decode


def _memory_order(x: Tensor) -> list[tuple[int, ...]]:
    """Indices of the elements of x (n c h w) in the order that masks are packed."""
    n, c, h, w = x.shape
    if is_channels_last(x):
        return [(a, b, i, j) for a in range(n) for i in range(h) for j in range(w) for b in range(c)]
    return [(a, b, i, j) for a in range(n) for b in range(c) for i in range(h) for j in range(w)]


def _cells(x: Tensor, cell_h: int, cell_w: int) -> list[list[Tensor]]:
    h, w = x.shape[2:]
    return [[x[:, :, i:i + cell_h, j:j + cell_w] for j in range(0, w, cell_w)] for i in range(0, h, cell_h)]


def _each_cell(x: Tensor, cell_h: int, cell_w: int, mean: bool) -> Tensor:
    def one(part: Tensor) -> Tensor:
        return part.sum((2, 3)) / (part.shape[2] * part.shape[3] if mean else 1)

    rows = [torch.stack([one(part) for part in row], -1) for row in _cells(x, cell_h, cell_w)]
    return torch.stack(rows, -2)


def _bits(bits: Tensor, like: Tensor) -> Tensor:
    keep = torch.zeros(like.shape, dtype=torch.float64)
    octets = bits.tolist()
    for at, where in enumerate(_memory_order(like)):
        keep[where] = octets[at // 8] >> (at % 8) & 1
    return keep


def slow_patch_mean(x: Tensor, cell_h: int, cell_w: int, by_channel: bool = False) -> Tensor:
    return _each_cell(x.double(), cell_h, cell_w, mean=True)


def slow_patch_spread(v: Tensor, h: int, w: int, cell_h: int, cell_w: int, channels_last: bool) -> Tensor:
    rows = torch.arange(h) // cell_h
    return v.double()[:, :, rows][..., torch.arange(w) // cell_w]


def _compared_as(x: Tensor, low: float, high: float) -> list[float]:
    return torch.tensor([low, high], dtype=x.dtype if x.dtype == torch.float64 else torch.float32).tolist()


def slow_mask_pack(x: Tensor, low: float, high: float) -> Tensor:
    packed = [0] * ((x.numel() + 7) // 8)
    low, high = _compared_as(x, low, high)
    values = x.double()
    for at, where in enumerate(_memory_order(x)):
        packed[at // 8] |= (low < values[where].item() < high) << (at % 8)
    return torch.tensor(packed, dtype=torch.float64)


def slow_mask_apply(g: Tensor, bits: Tensor) -> Tensor:
    return torch.where(_bits(bits, g) > 0, g.double(), 0)


def slow_mask_count(x: Tensor, low: float, high: float, cell_h: int, cell_w: int) -> Tensor:
    low, high = _compared_as(x, low, high)
    return _each_cell(((x.double() > low) & (x.double() < high)).double(), cell_h, cell_w, mean=False)


def slow_bits_count(bits: Tensor, n: int, c: int, h: int, w: int, cell_h: int, cell_w: int,
                    last: bool) -> Tensor:
    like = torch.empty((n, c, h, w), memory_format=memory_format(last))
    return _each_cell(_bits(bits, like), cell_h, cell_w, mean=False)


def slow_masked_patch_mean(g: Tensor, bits: Tensor, cell_h: int, cell_w: int) -> Tensor:
    return _each_cell(slow_mask_apply(g, bits), cell_h, cell_w, mean=True)


def slow_norm_backward(g: Tensor, bits: Tensor | None, x: Tensor | None, weight: Tensor | None, mean: Tensor,
                       var: Tensor, eps: float, wants_input: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Channel by channel."""
    masked = g.double() if bits is None else slow_mask_apply(g, bits)
    gx, gw, gb = torch.zeros(g.shape, dtype=torch.float64), *torch.zeros(2, g.shape[1], dtype=torch.float64)
    for k in range(g.shape[1]):
        deviation = math.sqrt(var[k].item() + eps)
        gx[:, k] = masked[:, k] * (1 if weight is None else weight[k].item()) / deviation
        gb[k] = masked[:, k].sum()
        if x is not None:
            gw[k] = (masked[:, k] * (x[:, k].double() - mean[k].item()) / deviation).sum()
    return gx if wants_input else gx.new_empty((0, 0, 0, 0)), gw if x is not None else gw[:0], gb


def slow_grid_products(g: Tensor, to_input: Tensor | None, to_weight: Tensor | None, x: Tensor | None, w: Tensor,
                       groups: int, wants_input: bool, spread: bool) -> tuple[Tensor, Tensor]:
    """Group by group, sample by sample, tap by tap."""
    (n, _, p, q), (o, i, ku, kv) = g.shape, w.shape
    gx = torch.zeros((n, groups * i, p, q) if wants_input else (0, 0, 0, 0), dtype=torch.float64)
    gw = torch.zeros((o, i, ku, kv) if x is not None else (0, 0), dtype=torch.float64)
    for k in range(o):
        mine = slice(k // (o // groups) * i, (k // (o // groups) + 1) * i)
        for sample in range(n):
            value = g[sample, k].double()
            if wants_input:
                for u, v in [(u, v) for u in range(ku) for v in range(kv)]:
                    scaled = value * (1 if to_input is None else to_input.double())
                    gx[sample, mine] += w[k, :, u, v].double()[:, None, None] * scaled
            if x is not None:
                scaled = value * (1 if to_weight is None else to_weight.double())
                gw[k] += (scaled * x[sample, mine].double()).sum((1, 2))[:, None, None]
    return gx, gw if spread or x is None else gw[:, :, 0, 0]


def slow_max_pool(x: Tensor, kh: int, kw: int, sh: int, sw: int, ph: int, pw: int, dh: int, dw: int,
                  ceil_mode: bool) -> tuple[Tensor, Tensor]:
    y = F.max_pool2d(x.double(), (kh, kw), (sh, sw), (ph, pw), (dh, dw), ceil_mode)
    index = torch.full_like(y, 255)
    p, q = y.shape[2:]
    for i in range(p):
        for j in range(q):
            best = torch.full(y.shape[:2], float("-inf"), dtype=torch.float64)
            seen = torch.zeros(y.shape[:2], dtype=torch.bool)
            for u in range(kh):
                for v in range(kw):
                    row, column = i * sh - ph + u * dh, j * sw - pw + v * dw
                    if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
                        value = x[:, :, row, column].double()
                        wins = (value > best) | value.isnan() | ~seen
                        index[:, :, i, j] = torch.where(wins, u * kw + v, index[:, :, i, j])
                        best, seen = torch.where(wins, value, best), seen | True
            assert torch.equal(best.nan_to_num(7), y[:, :, i, j].nan_to_num(7))
    return y, index


def slow_max_pool_backward(gy: Tensor, index: Tensor, h: int, w: int, kh: int, kw: int, sh: int, sw: int,
                           ph: int, pw: int, dh: int, dw: int) -> Tensor:
    gx = torch.zeros(*gy.shape[:2], h, w, dtype=torch.float64)
    for a, b, i, j in torch.cartesian_prod(*(torch.arange(size) for size in gy.shape)).tolist():
        position = int(index[a, b, i, j])
        if position != 255:
            row, column = i * sh - ph + position // kw * dh, j * sw - pw + position % kw * dw
            gx[a, b, row, column] += gy[a, b, i, j].double()
    return gx


def _size(arguments: tuple[Any, ...]) -> int:
    numbers = [x for x in arguments if isinstance(x, Tensor)]
    return max((8 if x.dtype == torch.uint8 else 1) * x.numel() for x in numbers)


@pytest.mark.parametrize("name", MAKERS)
def test_fallback_equals_slow_loop(name: str) -> None:
    tried, slow = 0, globals() | vars(group_reference) | vars(binary_reference) | vars(slow_adder)
    for seed, arguments in cases(name):
        if _size(arguments) > SLOWER.get(name, SMALL):
            continue
        if any(isinstance(x, Tensor) and x.numel() == 0 for x in arguments):
            assert not any(out.any() for out in as_tuple(getattr(fallback, name)(*arguments)))
            continue
        tried += 1
        wanted = slow[f"slow_{name}"](*arguments)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        got = as_tuple(getattr(fallback, name)(*arguments))
        for a, b in zip(got, wanted, strict=True):
            close = 2e-2 if a.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(a.double(), b.double(), equal_nan=True, rtol=close, atol=close,
                                       msg=lambda text, seed=seed: f"{name} seed {seed}: {text}")
    assert tried >= 5


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_max_pool_and_its_gradient_are_those_of_torch(ceil_mode: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 11, 13).round().requires_grad_()
    y = F.max_pool2d(x, 3, 2, 1, 1, ceil_mode)
    gy = torch.randn_like(y)
    y.backward(gy)
    mine, index = fallback.max_pool(x.detach(), 3, 3, 2, 2, 1, 1, 1, 1, ceil_mode)
    assert torch.equal(mine, y)
    torch.testing.assert_close(fallback.max_pool_backward(gy, index, 11, 13, 3, 3, 2, 2, 1, 1, 1, 1), x.grad)
