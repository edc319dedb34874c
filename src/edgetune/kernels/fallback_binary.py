"""Convolutions with one bit a weight in plain torch: on unpacked tensors, in float64, where all sums are exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetune.kernels.binary_format import LANES, WORD, BinaryLayer, order_of_lanes
from edgetune.kernels.geometry import ceil_div

_SHIFTS = torch.arange(WORD)


def _words(flags: Tensor) -> Tensor:
    """bool (... k) -> int64 (... ceil(k/64)), lowest bit first."""
    padded = F.pad(flags.long(), (0, -flags.shape[-1] % WORD))
    return (padded.unflatten(-1, (padded.shape[-1] // WORD, WORD)) << _SHIFTS.to(flags.device)).sum(-1)


def _flags(words: Tensor, count: int) -> Tensor:
    """The first `count` bits of every row of words: (... words) -> (... count), 0 or 1."""
    return (words[..., None] >> _SHIFTS.to(words.device) & 1).flatten(-2)[..., :count]


def _packed(positive: Tensor) -> Tensor:
    """bool (n c h w) -> int64 (n h w words)."""
    return _words(positive.permute(0, 2, 3, 1))


def _dense(x: Tensor) -> Tensor:
    """The numbers one after the other, whatever strides an axis of one has."""
    return x.clone(memory_format=torch.contiguous_format).view(-1)


def sign_pack(x: Tensor) -> Tensor:
    return _packed(x >= 0)


def _signs(bits: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    return (2 * _flags(bits, channels) - 1).to(dtype).permute(0, 3, 1, 2)


def sign_unpack(bits: Tensor, channels: int) -> Tensor:
    return _signs(bits, channels, torch.float32).contiguous(memory_format=torch.channels_last)


def arrange_filters(bits: Tensor, channels: int, groups: int = 1) -> Tensor:
    o, u, v, words = bits.shape
    if BinaryLayer(channels, o, u, v, groups=groups).is_depthwise:
        return _words((bits[..., 0] & 1).permute(1, 2, 0))
    used, blocks = ceil_div(channels // groups, 8), ceil_div(o // groups, LANES)
    octets = _dense(bits).view(torch.uint8).view(o, u, v, 8 * words)[..., :used]
    octets = octets.reshape(groups, o // groups, u, v, used)
    octets = F.pad(octets, (0, 0, 0, 0, 0, 0, 0, blocks * LANES - o // groups))
    lanes = octets.view(groups, blocks, LANES, u, v, used)[:, :, order_of_lanes(bits.device)]
    return _dense(lanes.permute(0, 1, 3, 4, 5, 2)).view(torch.int64).view(groups, blocks, u, v, used, LANES // 8)


def _weights(filters: Tensor, layer: BinaryLayer) -> Tensor:
    """Arranged filters -> +-1 float64 (o i u v)."""
    if layer.is_depthwise:
        return (2.0 * _flags(filters, layer.channels).double() - 1).permute(2, 0, 1)[:, None]
    groups, blocks, u, v, used, _ = filters.shape
    octets = _dense(filters).view(torch.uint8).view(groups, blocks, u, v, used, LANES)
    lanes = octets.permute(0, 1, 5, 2, 3, 4)
    octets = torch.empty_like(lanes)
    octets[:, :, order_of_lanes(filters.device)] = lanes
    octets = octets.reshape(groups, blocks * LANES, u, v, used)[:, : layer.out_channels // groups]
    shifts = torch.arange(8, dtype=torch.uint8, device=filters.device)
    flags = (octets[..., None] >> shifts & 1).flatten(-2)[..., : layer.channels // groups]
    return (2.0 * flags.double() - 1).reshape(layer.out_channels, u, v, -1).permute(0, 3, 1, 2)


def _sums(x: Tensor, filters: Tensor, layer: BinaryLayer) -> Tensor:
    """The convolution of x (n c h w) float64 itself."""
    top, left, bottom, right = layer.pads
    if x.shape[0] == 0 or layer.out_channels == 0:
        return x.new_empty((x.shape[0], layer.out_channels, *layer.out_size(*x.shape[2:])))
    x = F.pad(x, (left, right, top, bottom), value=layer.pad_value)
    return F.conv2d(x, _weights(filters, layer), None, (layer.stride_h, layer.stride_w), 0, (layer.dil_h, layer.dil_w),
                    layer.groups)


def _affine(sums: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    """Rounded to float32 after scale and shift, and after the residual."""
    if scale is not None:
        sums = sums * scale[:, None, None]
    if shift is not None:
        sums = sums + shift[:, None, None]
    y = sums.float().contiguous(memory_format=torch.channels_last)
    return y if residual is None else (y + residual).contiguous(memory_format=torch.channels_last)


def _binary_sums(bits: Tensor, filters: Tensor, layer: BinaryLayer) -> Tensor:
    return _sums(_signs(bits, layer.channels, torch.float64), filters, layer)


def binary_conv(bits: Tensor, filters: Tensor, scale: Tensor | None, layer: Sequence[int]) -> Tensor:
    return _affine(_binary_sums(bits, filters, BinaryLayer(*layer)), scale, None, None)


def binary_conv_clip(bits: Tensor, filters: Tensor, scale: Tensor | None, gain: Tensor | None, shift: Tensor | None,
                     residual: Tensor | None, low: float, high: float, whole: bool, signs: bool,
                     layer: Sequence[int]) -> tuple[Tensor, Tensor]:
    return affine_clip(binary_conv(bits, filters, scale, layer), gain, shift, residual, low, high, whole, signs)


def binary_conv_sign(bits: Tensor, filters: Tensor, threshold: Tensor, flip: Tensor | None,
                     layer: Sequence[int]) -> Tensor:
    reached = _binary_sums(bits, filters, BinaryLayer(*layer)) >= threshold[:, None, None]
    return _packed(reached if flip is None else reached ^ flip[:, None, None])


def affine_clip(x: Tensor, gain: Tensor | None, shift: Tensor | None, residual: Tensor | None, low: float, high: float,
                whole: bool, signs: bool) -> tuple[Tensor, Tensor]:
    if gain is not None:
        nought = torch.zeros_like(gain)
        x = F.batch_norm(x, nought, nought + 1, gain, shift, False, 0.0, 0.0)  # fused or not as torch's norms are here
    x = (x if residual is None else x + residual).clamp(low, high)
    return (x.contiguous(memory_format=torch.channels_last) if whole else x.new_empty((0, 0, 0, 0)),
            sign_pack(x) if signs else x.new_empty((0, 0, 0, 0), dtype=torch.int64))


def bit_weight_conv(x: Tensor, filters: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
                    layer: Sequence[int]) -> Tensor:
    sums = _sums(x.double(), filters, BinaryLayer(*layer))
    if scale is None and shift is None and residual is None:
        return sums.to(torch.int32).contiguous(memory_format=torch.channels_last)
    return _affine(sums, scale, shift, residual)
