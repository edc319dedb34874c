"""Every kernel in plain torch: runs on any device and float type, and what native code is tested against.

Half-precision inputs are summed and compared in float32; float64 stays float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetune.kernels import chance, meta
from edgetune.kernels.fallback_adder import (
    adder_conv,
    adder_conv_input_gradient,
    adder_conv_steps,
    adder_conv_u8,
    adder_filters,
)
from edgetune.kernels.fallback_binary import (
    affine_clip,
    arrange_filters,
    binary_conv,
    binary_conv_clip,
    binary_conv_sign,
    bit_weight_conv,
    sign_pack,
    sign_unpack,
)
from edgetune.kernels.fallback_bounded import bounded_decode, bounded_encode, bounded_sizes
from edgetune.kernels.geometry import (
    LARGEST,
    LEAST_STEP,
    NOTHING,
    ROWS,
    Groups,
    Pool,
    ceil_div,
    count_dtype,
    dense,
    is_channels_last,
    memory_format,
)

__all__ = ["adder_conv", "adder_conv_input_gradient", "adder_conv_u8", "adder_conv_steps", "adder_filters",
           "affine_clip", "arrange_filters", "binary_conv", "binary_conv_clip", "binary_conv_sign",
           "bit_weight_conv", "bounded_decode", "bounded_encode", "bounded_sizes", "sign_pack", "sign_unpack"]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _flat(x: Tensor) -> Tensor:
    """The elements of `x` in memory order."""
    x = dense(x)
    return (x.permute(0, 2, 3, 1) if is_channels_last(x) else x).reshape(-1)


def _cells(x: Tensor, cell_h: int, cell_w: int) -> Tensor:
    """x (n c h w) cut into cells: (n c P cell_h Q cell_w), zero where a border cell is short."""
    n, c, h, w = x.shape
    p, q = ceil_div(h, cell_h), ceil_div(w, cell_w)
    return F.pad(x, (0, q * cell_w - w, 0, p * cell_h - h)).reshape(n, c, p, cell_h, q, cell_w)


def _cell_size(size: int, cell: int, like: Tensor) -> Tensor:
    """Pixels of each cell along one axis: `cell`, and what is left for the last one."""
    starts = torch.arange(0, size, cell, device=like.device)
    return (size - starts).clamp(max=cell).to(like.dtype)


def _inside(x: Tensor, low: float, high: float) -> Tensor:
    wide = _wide(x)
    return (wide > low) & (wide < high)


def _unpack(bits: Tensor, elements: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> shifts & 1).reshape(-1)[:elements].bool()


def _unpack_as(bits: Tensor, shape: torch.Size | tuple[int, ...], channels_last: bool) -> Tensor:
    flat = _unpack(bits, torch.Size(shape).numel())
    if not channels_last:
        return flat.reshape(shape)
    n, c, h, w = shape
    return flat.reshape(n, h, w, c).permute(0, 3, 1, 2)


def patch_mean(x: Tensor, cell_h: int, cell_w: int, by_channel: bool = False) -> Tensor:
    if by_channel:
        return patch_mean(x, cell_h, cell_w).transpose(0, 1).contiguous().transpose(0, 1)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:2], ceil_div(x.shape[2], cell_h), ceil_div(x.shape[3], cell_w))
    wide = _wide(x)
    sizes = _cell_size(x.shape[2], cell_h, wide)[:, None] * _cell_size(x.shape[3], cell_w, wide)
    return (_cells(wide, cell_h, cell_w).sum((3, 5)) / sizes).to(x.dtype).contiguous()


def patch_spread(v: Tensor, h: int, w: int, cell_h: int, cell_w: int, channels_last: bool = False) -> Tensor:
    n, c, p, q = v.shape
    order = memory_format(channels_last)
    out = torch.empty((n, c, h, w), dtype=v.dtype, device=v.device, memory_format=order)
    tall = v[:, :, :, None, :, None].expand(n, c, p, cell_h, q, cell_w).reshape(n, c, p * cell_h, q * cell_w)
    return out.copy_(tall[:, :, :h, :w])


def mask_pack(x: Tensor, low: float, high: float) -> Tensor:
    inside = _inside(_flat(x), low, high).to(torch.uint8)
    octets = F.pad(inside, (0, -inside.numel() % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    return (octets * weights).sum(1, dtype=torch.uint8)


def mask_apply(g: Tensor, bits: Tensor) -> Tensor:
    g = dense(g)
    keep = _unpack_as(bits, g.shape, is_channels_last(g))
    out = torch.empty_like(g, memory_format=memory_format(is_channels_last(g)))
    return out.copy_(torch.where(keep, g, 0))


def _count(inside: Tensor, cell_h: int, cell_w: int) -> Tensor:
    counts = _cells(inside.to(torch.uint8), cell_h, cell_w).sum((3, 5), dtype=torch.int32)
    return counts.to(count_dtype(cell_h, cell_w)).contiguous()


def mask_count(x: Tensor, low: float, high: float, cell_h: int, cell_w: int) -> Tensor:
    return _count(_inside(x, low, high), cell_h, cell_w)


def bits_count(bits: Tensor, n: int, c: int, h: int, w: int, cell_h: int, cell_w: int,
               channels_last: bool = False) -> Tensor:
    return _count(_unpack_as(bits, (n, c, h, w), channels_last), cell_h, cell_w)


def masked_patch_mean(g: Tensor, bits: Tensor, cell_h: int, cell_w: int) -> Tensor:
    return patch_mean(mask_apply(g, bits), cell_h, cell_w)


def norm_backward(g: Tensor, bits: Tensor | None, x: Tensor | None, weight: Tensor | None, mean: Tensor, var: Tensor,
                  eps: float, wants_input: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = meta.norm_backward(g, bits, x, weight, mean, var, eps, wants_input)
    gx, gw, gb, scratch = outputs
    scratch.zero_()
    masked = dense(g) if bits is None else mask_apply(g, bits)
    inverse = (_wide(var) + eps).rsqrt()
    gb.copy_(masked.sum((0, 2, 3), dtype=gb.dtype))
    if x is not None:
        gw.copy_((masked * (_wide(x) - _wide(mean).view(-1, 1, 1))).sum((0, 2, 3)) * inverse)
    if wants_input:
        scale = inverse if weight is None else inverse * weight
        gx.copy_(masked * scale.view(-1, 1, 1))
    return outputs


def grid_products(g: Tensor, to_input: Tensor | None, to_weight: Tensor | None, x: Tensor | None, w: Tensor,
                  groups: int, wants_input: bool, spread: bool) -> tuple[Tensor, Tensor, Tensor]:
    gx, gw = g.new_empty((0, 0, 0, 0)), g.new_empty((0, 0))
    if wants_input:
        gx = _mix_input(_scaled(g, to_input), w.sum((2, 3), dtype=g.dtype), groups)
    if x is not None:
        gw = _mix_weight(_scaled(g, to_weight), x.to(g.dtype), groups)
        if spread:
            order = memory_format(is_channels_last(w))
            gw = torch.empty_like(w, dtype=g.dtype, memory_format=order).copy_(gw[:, :, None, None])
    return gx, gw, g.new_zeros(w.shape[0] * (w.shape[1] + ROWS - 1) if wants_input else 0)


def _scaled(g: Tensor, factor: Tensor | None) -> Tensor:
    """g (n o p q) times factor (p q), channel by channel: (o n p q)."""
    return (g if factor is None else g * factor).transpose(0, 1).contiguous()


def _mix_input(g: Tensor, w: Tensor, groups: int) -> Tensor:
    """g (o n p q) with w (o i), in groups -> gx (n c p q)."""
    o, n, p, q = g.shape
    i = w.shape[1]
    mixed = torch.matmul(w.view(groups, o // groups, i).transpose(1, 2), g.view(groups, o // groups, n * p * q))
    return mixed.view(groups * i, n, p, q).transpose(0, 1)


def _mix_weight(g: Tensor, x: Tensor, groups: int) -> Tensor:
    """g (o n p q) with x (n c p q), in groups -> gw (o i)."""
    o, c = g.shape[0], x.shape[1]
    columns = x.transpose(0, 1).contiguous().view(groups, c // groups, -1).transpose(1, 2)
    return torch.matmul(g.view(groups, o // groups, -1), columns).view(o, c // groups)


def _scales(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Least value and step (s 1) of every row (s group); NaN where a row holds what can't be packed."""
    low, high = rows.aminmax(dim=1, keepdim=True)
    span = high - low
    step = (span * (1 / (2**bits - 1))).clamp(min=LEAST_STEP)
    upwards = (step.view(torch.int32) + 0xFFFF & ~0xFFFF).view(torch.float32)  # to what bfloat16 holds
    fit = (rows.abs() <= LARGEST).all(1, keepdim=True)
    return torch.where(fit, low + 0.0, torch.nan), torch.where(fit, torch.where(span > 0, upwards, 0), torch.nan)


def group_pack(x: Tensor, bits: int, group: int, seed: int, stochastic: bool = True) -> Tensor:
    groups = Groups(bits, group)
    flat = _flat(x).float()
    scales = groups.scales(len(flat))
    rows = torch.cat([flat, flat[-1:].expand(scales * group - len(flat))]).reshape(scales, group)
    low, step = _scales(rows, bits)
    per_step = torch.where(step > 0, 65536 / step, 0)
    place = ((rows - low) * per_step).nan_to_num(0).round().clamp(max=(2**bits - 1) * 65536).long()
    noise = chance.draw(seed, scales, group, x.device) if stochastic else 32768
    codes = (place + noise >> 16).view(-1)
    codes[len(flat):] = 0
    shifts = torch.arange(0, 8, bits, device=x.device)[:, None]
    tiles = (codes.view(-1, 8 // bits, 8) << shifts).sum(1).to(torch.uint8)
    halves = (step.contiguous().view(torch.int32) >> 16).to(torch.int16)
    heads = [head.contiguous().view(-1).view(torch.uint8) for head in (low, halves)]
    return torch.cat([*heads, tiles.view(-1)])[: groups.size(len(flat))]


def group_unpack(packed: Tensor, bits: int, group: int, elements: int) -> Tensor:
    groups = Groups(bits, group)
    low, step = groups.scales_of(packed, elements)
    scales, codes = len(low), packed[6 * len(low) :]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)[:, None]
    flat = (codes.reshape(-1, 1, 8) >> shifts & 2**bits - 1).reshape(-1)
    rows = F.pad(flat, (0, scales * group - len(flat))).reshape(scales, group)
    return (low[:, None] + rows * step[:, None]).reshape(-1)[:elements]


def _sees(starts: Tensor, kernel: int, dil: int, size: int) -> Tensor:
    """Whether the window that starts at each pixel of `starts` has a position inside of [0, size)."""
    positions = starts[:, None] + torch.arange(kernel, device=starts.device) * dil
    return ((positions >= 0) & (positions < size)).any(1)


def max_pool(x: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
             dil_h: int, dil_w: int, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    x = dense(x)
    n, c, h, w = x.shape
    pool = Pool(kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w)
    order = memory_format(is_channels_last(x))
    p, q = pool.out_size(h, w, ceil_mode)
    if x.numel() == 0:
        y = torch.empty((n, c, p, q), dtype=x.dtype, device=x.device, memory_format=order)
        return y, torch.empty_like(y, dtype=torch.uint8)
    y, flat = F.max_pool2d(x, (kernel_h, kernel_w), (stride_h, stride_w), (pad_h, pad_w), (dil_h, dil_w),
                           ceil_mode, return_indices=True)
    top = torch.arange(p, device=x.device) * stride_h - pad_h
    left = torch.arange(q, device=x.device) * stride_w - pad_w
    row = torch.div(flat // w - top[:, None], dil_h, rounding_mode="floor")
    column = torch.div(flat % w - left, dil_w, rounding_mode="floor")
    seen = _sees(top, kernel_h, dil_h, h)[:, None] & _sees(left, kernel_w, dil_w, w)
    index = torch.where(seen, row * kernel_w + column, NOTHING).to(torch.uint8)
    return y.contiguous(memory_format=order), index.contiguous(memory_format=order)


def max_pool_backward(gy: Tensor, index: Tensor, h: int, w: int, kernel_h: int, kernel_w: int, stride_h: int,
                      stride_w: int, pad_h: int, pad_w: int, dil_h: int, dil_w: int) -> Tensor:
    n, c, p, q = index.shape
    position = index.long()
    seen = index != NOTHING
    row = torch.div(position, kernel_w, rounding_mode="floor") * dil_h
    row = row + torch.arange(p, device=gy.device)[:, None] * stride_h - pad_h
    column = position % kernel_w * dil_w + torch.arange(q, device=gy.device) * stride_w - pad_w
    at = torch.where(seen, row * w + column, 0).reshape(n, c, p * q)
    gx = torch.zeros((n, c, h * w), dtype=_wide(gy).dtype, device=gy.device)
    gx.scatter_add_(2, at, torch.where(seen, _wide(gy), 0).reshape(n, c, p * q))
    out = torch.empty((n, c, h, w), dtype=gy.dtype, device=gy.device,
                      memory_format=memory_format(is_channels_last(index)))
    return out.copy_(gx.reshape(n, c, h, w))
