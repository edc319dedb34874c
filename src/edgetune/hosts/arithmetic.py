"""The layer whose numbers an arithmetic method decides, and sums over what a convolution reads beyond its borders."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgetune.contract import ArithmeticMethod
from edgetune.overlap import ConvGeometry
from edgetune.recognise import ArithmeticLayer

PROGRESS = "progress"


class ArithmeticConv2d(nn.Conv2d, ArithmeticLayer):
    """x (n c h w) -> y (n o p q): a convolution by the numbers of `method`, with the parameters of `conv`.

    `geometry` is that of the call; maps of other sizes are taken. `progress` () is the share of the training that is
    over, which whoever trains it writes; 1 at first.
    """

    progress: torch.Tensor
    remembers = (PROGRESS,)

    def __init__(self, method: ArithmeticMethod, conv: nn.Conv2d, geometry: ConvGeometry) -> None:
        like = conv.weight
        padding: Any = conv.padding  # "same" too; `geometry` is what counts
        super().__init__(conv.in_channels, conv.out_channels, geometry.kernel, geometry.stride, padding,
                         geometry.dilation, geometry.groups, conv.bias is not None, device="meta")
        self.weight, self.bias = conv.weight, conv.bias
        self.method, self.geometry, self.same = method, geometry, geometry.same
        self.method_name = method.method
        self.register_buffer(PROGRESS, torch.ones((), device=like.device), persistent=False)
        self.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.method.convolve(x, self.weight, self.geometry.at(x.shape[2], x.shape[3]), self.progress)
        return y if self.bias is None else y + self.bias.view(1, -1, 1, 1)

    def take(self, method: ArithmeticMethod) -> None:
        """Compute by another method from now on, with the same parameters."""
        self.method, self.method_name = method, method.method

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method!r}"


def arithmetic_layers(model: nn.Module) -> dict[str, ArithmeticConv2d]:
    """The layers of a network whose numbers methods decide, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ArithmeticConv2d)}


def advance(model: nn.Module, progress: float) -> None:
    """Tell the layers of a network what share of the training is over, 0..1."""
    for layer in arithmetic_layers(model).values():
        layer.progress.fill_(progress)


def share(progress: torch.Tensor) -> float:
    """The number behind `progress`; 1 where tensors have none."""
    return 1.0 if progress.is_meta else float(progress)
