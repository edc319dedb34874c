"""The channel products of a backward pass on the grid, over all samples at once.

A grid tensor (n c l) whose memory runs channel by channel (c n l) is, to a channel product, one matrix (c, n l): one
large product instead of n small ones, and nothing to copy. What is made here, and kept for here, lies so.
"""

from __future__ import annotations

from typing import Any

import torch

from edgetune import kernels


def by_channel(x: torch.Tensor) -> torch.Tensor:
    """The same values (n c ...), laid out channel by channel; a copy only where they are not so yet."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def scaled_by_channel(x: torch.Tensor, factor: torch.Tensor | None) -> torch.Tensor:
    """x (n c p q) times factor (p q), laid out channel by channel."""
    if factor is None:
        return by_channel(x)
    n, c, p, q = x.shape
    out = torch.empty((c, n, p, q), dtype=x.dtype, device=x.device).transpose(0, 1)
    return torch.mul(x, factor, out=out)


def sum_taps(weight: torch.Tensor) -> torch.Tensor:
    """Sum over the kernel's taps: (o i u v) -> (o i), in either memory order."""
    if weight.shape[2:] == (1, 1):
        return weight[:, :, 0, 0]
    return weight.sum((2, 3)) if kernels.is_channels_last(weight) else kernels.tap_sum(weight)


def spread_taps(gw: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Every tap gets the same value: gw (o i) -> (o i u v) in the memory order of the weight."""
    o, i, ku, kv = weight.shape
    if (ku, kv) == (1, 1):
        return gw.view(o, i, 1, 1)
    if kernels.is_channels_last(weight):
        return gw[:, None, None, :].expand(o, ku, kv, i).contiguous().permute(0, 3, 1, 2)
    return kernels.tap_spread(gw, ku, kv)


def onednn_linear() -> Any:
    """oneDNN's matrix product, (m k) and (n k) -> (m n), where this build of torch has it: mm uses BLAS alone."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


_linear = onednn_linear()
LARGE = 64_000_000
"""Multiply-accumulates from which oneDNN's product is the faster one, by up to a third on two threads."""


def _across(weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """weight (o i) transposed, times columns (o l) -> (i l)."""
    large = weight.numel() * columns.shape[1] >= LARGE
    served = columns.dtype == torch.float32 and columns.device.type == "cpu" and not torch.is_grad_enabled()
    if _linear is None or not (large and served):
        return weight.T @ columns
    product: torch.Tensor = _linear(weight.T.contiguous(), columns.T, None, "none", [], "")
    return product


def mix_input(t: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    """(n o l) with weight (o i), in groups -> (n c l): the transposed channel product."""
    n, o, length = t.shape
    i = weight.shape[1]
    if groups == 1:
        return _across(weight, t.transpose(0, 1).flatten(1)).view(i, n, length).transpose(0, 1)
    if i == 1:
        return (t.view(n, groups, o // groups, length) * weight.view(1, groups, -1, 1)).sum(2)
    w = weight.view(groups, o // groups, i).transpose(1, 2)
    return torch.matmul(w, t.view(n, groups, o // groups, length)).view(n, groups * i, length)


def mix_weight(t: torch.Tensor, x: torch.Tensor, groups: int, factor: float = 1.0) -> torch.Tensor:
    """factor times (n o l) and x (n c l), in groups -> (o i): the product over samples and cells."""
    n, o, length = t.shape
    i = x.shape[1] // groups
    if groups == 1:
        rows, columns = t.transpose(0, 1).flatten(1), x.transpose(0, 1).flatten(1).T
        return rows @ columns if factor == 1 else torch.addmm(rows.new_empty(()), rows, columns, beta=0, alpha=factor)
    per_group = t.view(n, groups, o // groups, length)
    if i == 1:
        gw = (per_group * x.view(n, groups, 1, length)).sum((0, 3)).view(o, 1)
    else:
        gw = torch.einsum("ngol,ngil->goi", per_group, x.view(n, groups, i, length)).reshape(o, i)
    return gw if factor == 1 else gw * factor
