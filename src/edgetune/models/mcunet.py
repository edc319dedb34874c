"""Networks of the MCUNet class: inverted residuals with kernels of 3, 5 and 7 pixels, for microcontrollers.

`mcunet` has the shape of MCUNet-5FPS (Lin et al., NeurIPS 2020): 128 px, 42 convolutions in 14 blocks, 0.48 M
parameters without the head; here 28 M MACs. Kernels and expansions are ours, as the searched ones stand in no
table. `proxyless` follows ProxylessNAS-Mobile (Cai et al., ICLR 2019) without its last 1x1 layer;
`proxyless_0.3` is near the other network of the on-device training papers (20 blocks, 0.29 M parameters).
"""

from __future__ import annotations

import torch
from torch import nn

from edgetune.models.card import IMAGENET, ModelCard
from edgetune.models.layers import InvertedResidual, conv_norm_act, conv_symmetric, initialise, make_divisible

_SMALL = IMAGENET.model_copy(update={"size": (128, 128)})

CARDS = (
    ModelCard(
        name="mcunet",
        description="A network of the MCUNet-5FPS class for 128 px photos: 0.48 M parameters",
        input=_SMALL,
        options={"rows": "mcunet"},
    ),
    ModelCard(
        name="proxyless",
        description="ProxylessNAS-Mobile; `proxyless_0.3` is the microcontroller's width",
        input=_SMALL,
        options={"rows": "proxyless"},
    ),
)

Row = tuple[int, int, int, int]

# expansion, output channels, kernel, stride
ROWS: dict[str, tuple[Row, ...]] = {
    "mcunet": (
        (1, 8, 3, 1),
        (3, 16, 7, 2),
        (3, 16, 3, 1),
        (3, 16, 5, 1),
        (4, 24, 7, 2),
        (4, 24, 5, 1),
        (4, 24, 3, 1),
        (5, 40, 7, 2),
        (5, 40, 5, 1),
        (5, 48, 5, 1),
        (5, 48, 3, 1),
        (6, 96, 7, 2),
        (6, 96, 5, 1),
        (6, 160, 7, 1),
    ),
    "proxyless": (
        (1, 16, 3, 1),
        (3, 32, 5, 2),
        (3, 32, 3, 1),
        (3, 40, 7, 2),
        (3, 40, 3, 1),
        (3, 40, 5, 1),
        (3, 40, 5, 1),
        (6, 80, 7, 2),
        (3, 80, 5, 1),
        (3, 80, 5, 1),
        (3, 80, 5, 1),
        (6, 96, 5, 1),
        (3, 96, 5, 1),
        (3, 96, 5, 1),
        (3, 96, 5, 1),
        (6, 192, 7, 2),
        (6, 192, 7, 1),
        (3, 192, 7, 1),
        (3, 192, 7, 1),
        (6, 320, 7, 1),
    ),
}

STEMS = {"mcunet": 16, "proxyless": 32}


class SearchedNet(nn.Module):
    """x (n 3 h w) -> logits (n classes); the map shrinks 32 times."""

    def __init__(self, num_classes: int, rows: str, width: float) -> None:
        super().__init__()
        channels = make_divisible(STEMS[rows] * width)
        self.first_conv = conv_norm_act(conv_symmetric(3, channels, 3, 2), act=nn.ReLU6)
        blocks: list[nn.Module] = []
        for expand, base, kernel, stride in ROWS[rows]:
            out = make_divisible(base * width)
            blocks.append(InvertedResidual(channels, out, stride, expand, kernel))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.pool(self.blocks(self.first_conv(x))), 1))


def build(num_classes: int, *, rows: str = "mcunet", width: float = 1.0) -> nn.Module:
    """A network from one of the tables `ROWS`, scaled in width."""
    return initialise(SearchedNet(num_classes, rows, width))
