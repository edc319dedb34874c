"""MobileNetV3-Small (Howard et al., ICCV 2019): squeeze-excite and hard-swish; torchvision's key names."""

from __future__ import annotations

import torch
from torch import nn

from edgetune.models.card import ModelCard
from edgetune.models.layers import conv_norm_act, conv_symmetric, initialise, make_divisible

CARDS = (
    ModelCard(
        name="mobilenet_v3_small",
        description="MobileNetV3-Small: squeeze-excite and hard-swish, 2.5 M parameters at width 1",
    ),
)

# kernel, hidden channels, output channels, squeeze-excite, hard-swish (else ReLU), stride
BLOCKS = (
    (3, 16, 16, True, False, 2),
    (3, 72, 24, False, False, 2),
    (3, 88, 24, False, False, 1),
    (5, 96, 40, True, True, 2),
    (5, 240, 40, True, True, 1),
    (5, 240, 40, True, True, 1),
    (5, 120, 48, True, True, 1),
    (5, 144, 48, True, True, 1),
    (5, 288, 96, True, True, 2),
    (5, 576, 96, True, True, 1),
    (5, 576, 96, True, True, 1),
)

NORM_EPS = 1e-3


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from the channel means: x (n c h w) -> x * gate (n c 1 1)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))


class Block(nn.Module):
    """Expansion, depthwise, optional squeeze-excite, projection; residual where the shapes agree."""

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        kernel: int,
        stride: int,
        excite: bool,
        act: type[nn.Module],
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        if hidden != in_channels:
            stages.append(conv_norm_act(conv_symmetric(in_channels, hidden, 1), NORM_EPS, act))
        stages.append(conv_norm_act(conv_symmetric(hidden, hidden, kernel, stride, hidden), NORM_EPS, act))
        if excite:
            stages.append(SqueezeExcite(hidden, make_divisible(hidden // 4)))
        stages.append(conv_norm_act(conv_symmetric(hidden, out_channels, 1), NORM_EPS))
        self.block = nn.Sequential(*stages)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV3Small(nn.Module):
    """x (n 3 h w) -> logits (n classes); the map shrinks 32 times."""

    def __init__(self, num_classes: int, width: float, dropout: float) -> None:
        super().__init__()
        channels = make_divisible(16 * width)
        layers: list[nn.Module] = [conv_norm_act(conv_symmetric(3, channels, 3, 2), NORM_EPS, nn.Hardswish)]
        for kernel, hidden, out, excite, hard_swish, stride in BLOCKS:
            act = nn.Hardswish if hard_swish else nn.ReLU
            wide, narrow = make_divisible(hidden * width), make_divisible(out * width)
            layers.append(Block(channels, wide, narrow, kernel, stride, excite, act))
            channels = narrow
        layers.append(conv_norm_act(conv_symmetric(channels, 6 * channels, 1), NORM_EPS, nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        last = make_divisible(1024 * width)
        self.classifier = nn.Sequential(
            nn.Linear(6 * channels, last), nn.Hardswish(), nn.Dropout(dropout), nn.Linear(last, num_classes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def build(num_classes: int, *, width: float = 1.0, dropout: float = 0.2) -> nn.Module:
    """A MobileNetV3-Small."""
    return initialise(MobileNetV3Small(num_classes, width, dropout))
