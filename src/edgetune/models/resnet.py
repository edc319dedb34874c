"""ResNet-18 and ResNet-34 (He et al., CVPR 2016), key names as in torchvision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgetune.models.card import ModelCard
from edgetune.models.layers import conv_norm_act, conv_symmetric, initialise

CARDS = (
    ModelCard(
        name="resnet18",
        description="ResNet-18: basic residual blocks, 11.7 M parameters",
        options={"blocks": (2, 2, 2, 2)},
    ),
    ModelCard(
        name="resnet34",
        description="ResNet-34: basic residual blocks, 21.8 M parameters",
        options={"blocks": (3, 4, 6, 3)},
    ),
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual add, then ReLU: x (n i h w) -> y (n o h/stride w/stride)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_symmetric(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv_symmetric(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        same = stride == 1 and in_channels == out_channels
        self.downsample = (
            None if same else conv_norm_act(conv_symmetric(in_channels, out_channels, 1, stride))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """x (n 3 h w) -> logits (n classes); the map shrinks 32 times."""

    def __init__(self, num_classes: int, blocks: Sequence[int], width: float) -> None:
        super().__init__()
        channels = int(64 * width)
        self.conv1 = conv_symmetric(3, channels, 7, 2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for stage, repeats in enumerate(blocks):
            out = int(64 * width) * 2**stage
            first = BasicBlock(channels, out, 1 if stage == 0 else 2)
            self.add_module(
                f"layer{stage + 1}",
                nn.Sequential(first, *(BasicBlock(out, out, 1) for _ in range(repeats - 1))),
            )
            channels = out
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self.stages = len(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def build(num_classes: int, *, blocks: Sequence[int] = (2, 2, 2, 2), width: float = 1.0) -> nn.Module:
    """A ResNet of basic blocks; `blocks` counts them per stage."""
    return initialise(ResNet(num_classes, blocks, width))
