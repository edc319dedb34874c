"""A small residual network for pictures of single digits; its weights ship in the package.

`scripts/pretrain_digits.py` makes the weights from scikit-learn's handwritten digits as they are; the demo
then adapts them to the same digits as a different camera would see them.
"""

from __future__ import annotations

import torch
from torch import nn

from edgetune.models.card import InputSpec, ModelCard
from edgetune.models.layers import conv_norm_act, conv_symmetric, initialise

CARDS = (
    ModelCard(
        name="digits_net",
        description="A residual net for 32 px digits: 63 k parameters, weights included",
        classes=10,
        weights="digits_net.safetensors",
        input=InputSpec(size=(32, 32), resize="stretch", channels=1, mean=(0.5,), std=(0.5,)),
    ),
)


class Residual(nn.Module):
    """conv -> norm -> ReLU -> conv -> norm, added to the input, then ReLU: x (n c h w) -> y (n c h w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *conv_norm_act(conv_symmetric(channels, channels, 3), act=nn.ReLU),
            *conv_norm_act(conv_symmetric(channels, channels, 3)),
        )
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(x + self.inner(x))


class DigitsNet(nn.Module):
    """x (n c h w) -> logits (n classes); the map shrinks 4 times."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm_act(conv_symmetric(in_channels, 16, 3), act=nn.ReLU),
            Residual(16),
            conv_norm_act(conv_symmetric(16, 32, 3, 2), act=nn.ReLU),
            Residual(32),
            conv_norm_act(conv_symmetric(32, 48, 3, 2), act=nn.ReLU),
            conv_norm_act(conv_symmetric(48, 48, 3), act=nn.ReLU),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(48, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


def build(num_classes: int, *, in_channels: int = 1) -> nn.Module:
    """A digits network for grey (1) or colour (3) pictures."""
    return initialise(DigitsNet(num_classes, in_channels))
