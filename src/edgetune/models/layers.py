"""The few building blocks that several networks share. Everything here is a plain torch layer underneath."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

Pads = tuple[int, int, int, int]


class Conv2dSame(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: ceil(size / stride) pixels come out, the odd zero goes
    last.

    x (n c h w) -> y (n o ceil(h / stride) ceil(w / stride)). Unlike `padding="same"` it takes strides; the
    padding depends on the map, so `padding` reads 0 and `pads(h, w)` is asked instead.
    """

    def pads(self, h: int, w: int) -> Pads:
        """Zeros added to a map of h x w pixels: (top, bottom, left, right)."""
        top, bottom = _same(h, self.kernel_size[0], self.stride[0], self.dilation[0])
        left, right = _same(w, self.kernel_size[1], self.stride[1], self.dilation[1])
        return top, bottom, left, right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _conv_same(x, self.weight, self.bias, self.stride, self.dilation, self.groups)


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


@fx.wrap
def _conv_same(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> torch.Tensor:
    # one call to a tracer that steps inside: the padding needs the map's size as plain integers
    top, bottom = _same(x.shape[-2], weight.shape[-2], stride[0], dilation[0])
    left, right = _same(x.shape[-1], weight.shape[-1], stride[1], dilation[1])
    if top == bottom and left == right:
        return F.conv2d(x, weight, bias, stride, (top, left), dilation, groups)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)


ConvMaker = Callable[..., nn.Conv2d]
"""Makes a bias-free convolution: (in_channels, out_channels, kernel, stride, groups)."""


def conv_symmetric(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A bias-free convolution padded alike on both sides, as torch's networks are."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)


def conv_tensorflow(
    in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """A bias-free convolution padded as TensorFlow does; a 1x1 one needs no padding and stays stock."""
    layer = nn.Conv2d if kernel == 1 else Conv2dSame
    return layer(in_channels, out_channels, kernel, stride, groups=groups, bias=False)


PADDINGS: dict[str, ConvMaker] = {"symmetric": conv_symmetric, "same": conv_tensorflow}
"""The values of the `padding` option."""


def make_divisible(channels: float, divisor: int = 8) -> int:
    """Round a scaled channel count to a multiple of `divisor`, never over a tenth below what was asked."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def conv_norm_act(
    conv: nn.Conv2d, eps: float = 1e-5, act: Callable[[], nn.Module] | None = None
) -> nn.Sequential:
    """conv -> batch norm -> activation (left out when `act` is None); keys 0, 1."""
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(conv.out_channels, eps=eps)]
    return nn.Sequential(*layers, *([act()] if act is not None else []))


class InvertedResidual(nn.Module):
    """1x1 expansion -> depthwise -> 1x1 projection, with a residual add where the shapes agree (MobileNetV2).

    x (n i h w) -> y (n o h/stride w/stride). Key names are torchvision's: conv.0.0, conv.1.0, conv.2, conv.3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expand: int,
        kernel: int = 3,
        conv: ConvMaker = conv_symmetric,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden = in_channels * expand
        stages: list[nn.Module] = []
        if expand != 1:
            stages.append(conv_norm_act(conv(in_channels, hidden, 1), eps, nn.ReLU6))
        stages += [
            conv_norm_act(conv(hidden, hidden, kernel, stride, hidden), eps, nn.ReLU6),
            conv(hidden, out_channels, 1),
            nn.BatchNorm2d(out_channels, eps=eps),
        ]
        self.conv = nn.Sequential(*stages)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


def initialise(model: nn.Module) -> nn.Module:
    """He-normal convolutions, unit norms, small normal linears: where the field starts training."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model
