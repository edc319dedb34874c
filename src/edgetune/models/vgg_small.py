"""VGG-small for CIFAR: six 3x3 convolutions and one linear layer, the plain network that binary methods compare on.

Simonyan and Zisserman's pattern (ICLR 2015), cut down as in Zhang et al., "LQ-Nets", ECCV 2018.
"""

from __future__ import annotations

import torch
from torch import nn

from edgetune.models.card import IMAGENET, ModelCard
from edgetune.models.layers import conv_symmetric, initialise, make_divisible

CARDS = (
    ModelCard(
        name="vgg_small",
        description="VGG-small for 32 px pictures: 4.7 M parameters",
        classes=10,
        input=IMAGENET.model_copy(update={"size": (32, 32), "crop_fraction": 1.0}),
    ),
)

SIDE = 4
"""Pixels on a side of the last map."""


class VGGSmall(nn.Module):
    """x (n 3 32 32) -> logits (n classes)."""

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in (128, 256, 512):
            out = make_divisible(stage * width)
            for source in (channels, out):
                layers += [conv_symmetric(source, out, 3), nn.BatchNorm2d(out), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * SIDE * SIDE, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def build(num_classes: int, *, width: float = 1.0) -> nn.Module:
    """A VGG-small; `width` scales its channels."""
    return initialise(VGGSmall(num_classes, width))
