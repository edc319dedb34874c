"""ResNet-8 of the MLPerf Tiny benchmark (Banbury et al., 2021): SAME padding, eps 1e-3, inputs 0..255.

Published files carry Keras names and a bias on every convolution; `translate_state` renames them and folds
the biases into the norms that follow. The 1x1 shortcuts have no norm and keep theirs.
"""

from __future__ import annotations

import torch
from torch import nn

from edgetune.models.card import InputSpec, ModelCard
from edgetune.models.keras import fold_conv_bias, is_keras, numbered, rename_norm
from edgetune.models.layers import conv_tensorflow, initialise

_INPUT = InputSpec(
    size=(32, 32), crop_fraction=1.0, value_range=(0.0, 255.0), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)
)

CARDS = (
    ModelCard(
        name="resnet8",
        description="MLPerf Tiny's ResNet-8 for 32 px pictures: 78 k parameters",
        classes=10,
        input=_INPUT,
    ),
)


class Block(nn.Module):
    """Two 3x3 convolutions and a residual add; a strided block has a biased 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_tensorflow(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.relu1 = nn.ReLU()
        self.conv2 = conv_tensorflow(out_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.relu2 = nn.ReLU()
        self.shortcut = None if stride == 1 else nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet8(nn.Module):
    """x (n 3 h w) -> logits (n classes); the map shrinks 4 times."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv_tensorflow(3, 16, 3)
        self.bn1 = nn.BatchNorm2d(16, eps=1e-3)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))

    def translate_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keras names to these; other states pass as they are."""
        if not is_keras(state):
            return state
        # Keras numbers the convolutions in the order they were made: the shortcuts come third in their blocks
        convs = [
            "conv1",
            "blocks.0.conv1",
            "blocks.0.conv2",
            "blocks.1.conv1",
            "blocks.1.conv2",
            "blocks.1.shortcut",
            "blocks.2.conv1",
            "blocks.2.conv2",
            "blocks.2.shortcut",
        ]
        out = {"fc.weight": state["dense.kernel"], "fc.bias": state["dense.bias"]}
        norms = 0
        for index, conv in enumerate(convs):
            source = numbered("conv2d", index)
            out[f"{conv}.weight"] = state[f"{source}.kernel"]
            if conv.endswith("shortcut"):
                out[f"{conv}.bias"] = state[f"{source}.bias"]
                continue
            norm = conv.replace("conv", "bn")
            out |= rename_norm(state, numbered("batch_normalization", norms), norm)
            fold_conv_bias(out, norm, state[f"{source}.bias"])
            norms += 1
        return out


def build(num_classes: int) -> nn.Module:
    """A ResNet-8."""
    return initialise(ResNet8(num_classes))
