"""ResNet-20 for CIFAR (He et al., CVPR 2016, §4.2), with shortcuts that have no parameters (option A).

Binary networks want a shortcut around every convolution, so that the float map goes on where its signs were taken
(Liu et al., "Bi-Real Net", ECCV 2018). The parameters are the same.
"""

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
    ModelCard(
        name="resnet20_bireal",
        description="ResNet-20 with a shortcut around every convolution, for binary networks",
        classes=10,
        input=IMAGENET.model_copy(update={"size": (32, 32), "crop_fraction": 1.0}),
        options={"bireal": True},
    ),
)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut around both, or with `bireal` one around each; where the map shrinks, every
    second pixel and zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, bireal: bool) -> None:
        super().__init__()
        self.conv1 = conv_symmetric(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = conv_symmetric(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.stride = stride
        self.new_channels = out_channels - in_channels
        self.bireal = bireal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.bireal:
            y = self.relu1(self.bn1(self.conv1(x)) + self.shortcut(x))
            return self.relu2(self.bn2(self.conv2(y)) + y)
        return self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))) + self.shortcut(x))

    def shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """x (n i h w) -> (n o h/stride w/stride)"""
        if self.stride != 1:
            before = self.new_channels // 2
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before)
            )
        return x


class ResNet20(nn.Module):
    """x (n 3 h w) -> logits (n classes); the map shrinks 4 times."""

    def __init__(self, num_classes: int, bireal: bool) -> None:
        super().__init__()
        self.conv1 = conv_symmetric(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(*(Block(16, 16, 1, bireal) for _ in range(3)))
        self.layer2 = nn.Sequential(*(Block(i, 32, s, bireal) for i, s in ((16, 2), (32, 1), (32, 1))))
        self.layer3 = nn.Sequential(*(Block(i, 64, s, bireal) for i, s in ((32, 2), (64, 1), (64, 1))))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
        return self.linear(torch.flatten(self.avgpool(x), 1))


def build(num_classes: int, *, bireal: bool = False) -> nn.Module:
    """A ResNet-20; `bireal`: with a shortcut around every convolution."""
    return initialise(ResNet20(num_classes, bireal))
