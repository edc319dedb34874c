"""The convolutions with one bit a weight, from the definition: weights read bit by bit, float64 conv2d of +-1 maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from edgetune.kernels import BinaryLayer


def slow_sign_pack(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    packed = torch.zeros((n, h, w, (c + 63) // 64), dtype=torch.int64)
    for channel in range(c):
        packed[..., channel // 64] |= (x[:, channel] >= 0).long() << channel % 64
    return packed.double()


def slow_sign_unpack(bits: Tensor, channels: int) -> Tensor:
    planes = [bits[..., c // 64] >> c % 64 & 1 for c in range(channels)]
    return (2 * torch.stack(planes, 1) - 1).double()


def slow_arrange_filters(bits: Tensor, channels: int, groups: int) -> Tensor:
    """Byte by byte; bit by bit where the layer is depthwise."""
    o, u, v, _ = bits.shape
    if BinaryLayer(channels, o, u, v, groups=groups).is_depthwise:
        return slow_sign_pack((bits[..., 0] & 1).view(1, o, u, v) - 1).view(u, v, -1)
    each, used = o // groups, (channels // groups + 7) // 8
    blocks = (each + 31) // 32
    octets = torch.zeros((groups, blocks, u, v, used, 32), dtype=torch.uint8)
    for k in range(o):
        f = k % each % 32
        lane = 2 * f if f < 16 else 2 * f - 31
        for byte in range(used):
            octets[k // each, k % each // 32, :, :, byte, lane] = bits[k, :, :, byte // 8] >> 8 * (byte % 8) & 255
    return octets.view(torch.int64).double()


def weight_of(filters: Tensor, layer: BinaryLayer) -> Tensor:
    """+-1 (o i u v) of arranged filters."""
    if layer.is_depthwise:
        return slow_sign_unpack(filters[None], layer.channels).transpose(0, 1)
    octets = filters.contiguous().view(-1).view(torch.uint8).view(*filters.shape[:-1], 32)
    each, i = layer.out_channels // layer.groups, layer.channels // layer.groups
    k = torch.arange(layer.out_channels)
    f = k % each % 32
    block, lane = k % each // 32, torch.where(f < 16, 2 * f, 2 * f - 31)
    planes = [octets[k // each, block, :, :, c // 8, lane] >> c % 8 & 1 for c in range(i)]
    return 2.0 * torch.stack(planes, 1).double() - 1


def _conv(x: Tensor, filters: Tensor, layer: BinaryLayer) -> Tensor:
    x = F.pad(x, (layer.pad_left, layer.pad_right, layer.pad_top, layer.pad_bottom), value=layer.pad_value)
    return F.conv2d(x, weight_of(filters, layer), None, (layer.stride_h, layer.stride_w), 0,
                    (layer.dil_h, layer.dil_w), layer.groups)


def _affine(y: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    y = y if scale is None else y * scale.double().view(-1, 1, 1)
    y = y if shift is None else y + shift.double().view(-1, 1, 1)
    return y if residual is None else y + residual.double()


def slow_binary_conv(bits: Tensor, filters: Tensor, scale: Tensor | None, numbers: Sequence[int]) -> Tensor:
    layer = BinaryLayer(*numbers)
    x = slow_sign_unpack(bits, layer.channels)
    return _affine(_conv(x, filters, layer), scale, None, None)


def slow_binary_conv_clip(bits: Tensor, filters: Tensor, scale: Tensor | None, *given: Any) -> tuple[Tensor, Tensor]:
    *clip, numbers = given
    return slow_affine_clip(slow_binary_conv(bits, filters, scale, numbers), *clip)


def slow_binary_conv_sign(bits: Tensor, filters: Tensor, threshold: Tensor, flip: Tensor | None,
                          numbers: Sequence[int]) -> Tensor:
    y = slow_binary_conv(bits, filters, None, numbers)
    reached = (y >= threshold.double().view(-1, 1, 1)).double()
    if flip is not None:
        reached = (reached - flip.double().view(-1, 1, 1)).abs()
    return slow_sign_pack(reached - 0.5)


def slow_affine_clip(x: Tensor, gain: Tensor | None, shift: Tensor | None, residual: Tensor | None, low: float,
                     high: float, whole: bool, signs: bool) -> tuple[Tensor, Tensor]:
    y, nothing = _affine(x.double(), gain, shift, residual).clamp(low, high), torch.zeros((0, 0, 0, 0)).double()
    return y if whole else nothing, slow_sign_pack(y) if signs else nothing


def slow_bit_weight_conv(x: Tensor, filters: Tensor, scale: Tensor | None, shift: Tensor | None,
                         residual: Tensor | None, numbers: Sequence[int]) -> Tensor:
    return _affine(_conv(x.double(), filters, BinaryLayer(*numbers)), scale, shift, residual)
