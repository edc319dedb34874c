"""MobileNetV2 (Sandler et al., CVPR 2018), key names as in torchvision.

`mobilenet_v2` has torch's symmetric padding; `mobilenet_v2_tf` is the same network as TensorFlow trained it:
SAME padding, batch-norm eps 1e-3, a background class and inputs in [-1, 1]. Both take a width suffix:
`mobilenet_v2_0.35`.
"""

from __future__ import annotations

import torch
from torch import nn

from edgetune.models.card import TENSORFLOW, ModelCard
from edgetune.models.layers import PADDINGS, InvertedResidual, conv_norm_act, initialise, make_divisible

CARDS = (
    ModelCard(
        name="mobilenet_v2", description="MobileNetV2: inverted residuals, 3.5 M parameters at width 1"
    ),
    ModelCard(
        name="mobilenet_v2_tf",
        description="MobileNetV2 as TensorFlow trained it: SAME padding, 1001 classes",
        classes=1001,
        input=TENSORFLOW,
        options={"padding": "same", "norm_eps": 1e-3},
    ),
)

# expansion, output channels, repeats, stride of the first
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """x (n 3 h w) -> logits (n classes); the map shrinks 32 times."""

    def __init__(self, num_classes: int, width: float, padding: str, norm_eps: float, dropout: float) -> None:
        super().__init__()
        conv = PADDINGS[padding]
        channels, last = make_divisible(32 * width), make_divisible(1280 * max(1.0, width))
        layers: list[nn.Module] = [conv_norm_act(conv(3, channels, 3, 2), norm_eps, nn.ReLU6)]
        for expand, base, repeats, first_stride in STAGES:
            for index in range(repeats):
                out = make_divisible(base * width)
                stride = first_stride if index == 0 else 1
                layers.append(InvertedResidual(channels, out, stride, expand, conv=conv, eps=norm_eps))
                channels = out
        layers.append(conv_norm_act(conv(channels, last, 1), norm_eps, nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def build(
    num_classes: int,
    *,
    width: float = 1.0,
    padding: str = "symmetric",
    norm_eps: float = 1e-5,
    dropout: float = 0.2,
) -> nn.Module:
    """A MobileNetV2; `padding` is "symmetric" or "same"."""
    return initialise(MobileNetV2(num_classes, width, padding, norm_eps, dropout))
