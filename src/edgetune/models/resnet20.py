"""ResNet-20 for CIFAR (He et al., CVPR 2016, §4.2), with shortcuts that have no parameters (option A)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.models.card import IMAGENET, ModelCard
from edgetune.models.layers import conv_symmetric, initialise

CARDS = (
    ModelCard(
        name="resnet20",
        description="ResNet-20 for 32 px pictures: 0.27 M parameters",
        classes=10,
        input=IMAGENET.model_copy(update={"size": (32, 32), "crop_fraction": 1.0}),
    ),
)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; where the map shrinks, every second pixel and zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_symmetric(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv_symmetric(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            before = self.new_channels // 2
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before)
            )
        return self.relu2(y + x)


class ResNet20(nn.Module):
    """x (n 3 h w) -> logits (n classes); the map shrinks 4 times."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv_symmetric(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.linear(torch.flatten(self.avgpool(x), 1))


def build(num_classes: int) -> nn.Module:
    """A ResNet-20."""
    return initialise(ResNet20(num_classes))
