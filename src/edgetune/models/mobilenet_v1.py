"""MobileNetV1 (Howard et al., 2017): thirteen depthwise-separable layers, SAME padding, batch-norm eps 1e-3.

Keys are conv1, bn1, blocks.1 ... blocks.13 with dw, dw_bn, pw, pw_bn, and classifier. Files with Keras names,
as MLPerf Tiny publishes them, are read too: `translate_state` renames them and folds their convolution biases
into the norms.
"""

from __future__ import annotations

import torch
from torch import nn

from edgetune.models.card import TENSORFLOW, InputSpec, ModelCard
from edgetune.models.keras import fold_conv_bias, is_keras, numbered, rename_norm
from edgetune.models.layers import conv_tensorflow, initialise

_PERSON = InputSpec(size=(96, 96), resize="stretch", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

CARDS = (
    ModelCard(
        name="mobilenet_v1",
        description="MobileNetV1: depthwise-separable layers, 4.2 M parameters at width 1",
        input=TENSORFLOW,
    ),
    ModelCard(
        name="mobilenet_v1_vww",
        classes=2,
        input=_PERSON,
        options={"width": 0.25, "activation": "relu"},
        description="MLPerf Tiny's person detector: MobileNetV1 at width 0.25 for 96 px photos",
    ),
)

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "relu6": nn.ReLU6}

# output channels, stride
LAYERS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *((512, 1),) * 5, (1024, 2), (1024, 1))


class Separable(nn.Module):
    """Depthwise 3x3, norm, activation, pointwise 1x1, norm, activation: x (n i h w) -> y (n o h/s w/s)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.dw = conv_tensorflow(in_channels, in_channels, 3, stride, in_channels)
        self.dw_bn = nn.BatchNorm2d(in_channels, eps=1e-3)
        self.dw_act = activation()
        self.pw = conv_tensorflow(in_channels, out_channels, 1)
        self.pw_bn = nn.BatchNorm2d(out_channels, eps=1e-3)
        self.pw_act = activation()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pw_act(self.pw_bn(self.pw(self.dw_act(self.dw_bn(self.dw(x))))))


class MobileNetV1(nn.Module):
    """x (n 3 h w) -> logits (n classes); the map shrinks 32 times."""

    def __init__(self, num_classes: int, width: float, activation: type[nn.Module], dropout: float) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv1 = conv_tensorflow(3, channels, 3, 2)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.act1 = activation()
        self.blocks = nn.Sequential()
        for index, (base, stride) in enumerate(LAYERS, start=1):
            self.blocks.add_module(str(index), Separable(channels, int(base * width), stride, activation))
            channels = int(base * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.act1(self.bn1(self.conv1(x))))
        return self.classifier(self.dropout(torch.flatten(self.pool(x), 1)))

    def translate_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keras names to these; other states pass as they are."""
        if not is_keras(state):
            return state
        names: list[tuple[str, str]] = [("conv1", "bn1")]
        for index in range(1, len(LAYERS) + 1):
            names += [
                (f"blocks.{index}.dw", f"blocks.{index}.dw_bn"),
                (f"blocks.{index}.pw", f"blocks.{index}.pw_bn"),
            ]
        out = {"classifier.weight": state["dense.kernel"], "classifier.bias": state["dense.bias"]}
        for index, (conv, norm) in enumerate(names):
            kind, number = ("conv2d", index // 2) if index % 2 == 0 else ("depthwise_conv2d", index // 2)
            kernel = "kernel" if kind == "conv2d" else "depthwise_kernel"
            source = numbered(kind, number)
            out[f"{conv}.weight"] = state[f"{source}.{kernel}"]
            out |= rename_norm(state, numbered("batch_normalization", index), norm)
            fold_conv_bias(out, norm, state[f"{source}.bias"])
        return out


def build(
    num_classes: int, *, width: float = 1.0, activation: str = "relu6", dropout: float = 0.0
) -> nn.Module:
    """A MobileNetV1; `activation` is "relu6" or "relu"."""
    return initialise(MobileNetV1(num_classes, width, ACTIVATIONS[activation], dropout))
