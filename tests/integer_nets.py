"""Small networks with everything that an integer network may hold, calibrated on random pictures."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.models.layers import Conv2dSame
from edgetune.quantize import Quantized, QuantizedNetwork, quantize

SHAPE = (2, 3, 11, 9)


class Odd(nn.Module):
    """Odd maps, SAME padding with strides, dilation, groups, adds of three kinds, a shortcut without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(Conv2dSame(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, (3, 1), padding=(1, 0), groups=8, bias=False), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()
        self.last = nn.Sequential(nn.Conv2d(8, 12, (2, 3), 2, padding=(0, 1), bias=False), nn.BatchNorm2d(12))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.relu(self.deep(self.wide(x)) + x)
        y = self.last(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 3))
        return self.classifier(torch.flatten(self.pool(y + short), 1))


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norms and biases with numbers of their own, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            c = layer.num_features
            layer.weight.data = 1 + 0.5 * torch.rand(c, generator=generator)
            layer.bias.data = 0.5 * torch.randn(c, generator=generator)
            layer.running_mean = 0.2 * torch.randn(c, generator=generator)
            layer.running_var = 0.5 + torch.rand(c, generator=generator)
    return model.eval()


def odd() -> tuple[nn.Module, Quantized, torch.Tensor]:
    """A float network, its integer twin and a picture batch."""
    torch.manual_seed(0)
    model = with_statistics(Odd())
    pictures = torch.randn(8, *SHAPE[1:])
    return model, quantize(model, pictures.split(3)), pictures[:2]


def kept(network: QuantizedNetwork, x: torch.Tensor) -> int:
    """Bytes that a forward pass leaves for backward, by storage, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = network(x)
    assert y.shape
    return sum(seen.values())
