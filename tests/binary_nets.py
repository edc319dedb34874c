"""Small networks with binary layers, of every shape that packing meets, and a look at the bits they read."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from edgetune.apply import rewrite
from edgetune.contract import ArithmeticMethod, Plan
from edgetune.graph import trace
from edgetune.hosts.arithmetic import arithmetic_layers
from edgetune.kernels import sign_pack
from edgetune.models import Conv2dSame


def _conv(i: int, o: int, kernel: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())


class _Head(nn.Module):
    """Mean and a linear layer behind `body`."""

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(channels, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean([2, 3]))


class _Residual(nn.Module):
    """norm(conv) + shortcut, then ReLU; the shortcut is x, every second pixel of it with zero channels, or a 1x1
    convolution with a norm."""

    def __init__(self, i: int, o: int, stride: int = 1, convolved: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.relu2 = nn.ReLU()
        self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if convolved else None
        self.stride, self.more = stride, o - i

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.short is not None:
            x = self.short(x)
        elif self.stride != 1:
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return self.relu2(y + x)


class _TwoReaders(nn.Module):
    """One map, read by a layer of one group, a depthwise one and a float gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.one, self.two = _conv(8, 8), _conv(8, 8, groups=8)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return (self.one(x) + self.two(x)) * self.gate(x)


def plain() -> nn.Module:
    """Odd channels, a bias, dropout, pools that move in front of their norms: bits to bits, with pools of sums."""
    return _Head(nn.Sequential(
        _conv(3, 7), nn.MaxPool2d(2), _conv(7, 13, bias=True), nn.MaxPool2d(3, 2, 1), nn.Dropout(), _conv(13, 70, 2, 2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True), _conv(70, 9)), 9)


def late_pool() -> nn.Module:
    """Pools that stay behind their activations."""
    return _Head(nn.Sequential(_conv(3, 8), _conv(8, 70), nn.Identity(), nn.MaxPool2d(3, 2, 1, 1), _conv(70, 8),
                               nn.Identity(), nn.MaxPool2d(2, 1, dilation=2), _conv(8, 8)), 8)


def residual() -> nn.Module:
    return _Head(nn.Sequential(_conv(3, 8), _Residual(8, 8), _Residual(8, 14, 2), _Residual(14, 14)), 14)


def downsampled() -> nn.Module:
    return _Head(nn.Sequential(_conv(3, 8), nn.MaxPool2d(3, 2, 1), _Residual(8, 8), _Residual(8, 12, 2, True)), 12)


def two_readers() -> nn.Module:
    return _Head(_TwoReaders(), 8)


def mobile() -> nn.Module:
    """A binary layer that reads the picture, depthwise layers with ReLU6, a smooth activation, one binary layer right
    behind another."""
    return _Head(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(),
                               nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
                               nn.Conv2d(8, 12, 1), nn.Hardswish(), nn.Conv2d(12, 6, 1)), 6)


def same() -> nn.Module:
    """TensorFlow's padding, which follows the map's size."""
    return _Head(nn.Sequential(Conv2dSame(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), Conv2dSame(8, 8, 3, 2),
                               nn.BatchNorm2d(8), nn.ReLU(), Conv2dSame(8, 8, 4, dilation=2), nn.BatchNorm2d(8)), 8)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "plain": (plain, ("body.2.0", "body.5.0", "body.7.0")),
    "late_pool": (late_pool, ("body.1.0", "body.4.0", "body.7.0")),
    "residual": (residual, tuple(f"body.{b}.conv{c}" for b in (1, 2, 3) for c in (1, 2))),
    "downsampled": (downsampled, tuple(f"body.{b}.conv{c}" for b in (2, 3) for c in (1, 2))),
    "two_readers": (two_readers, ("body.one.0", "body.two.0")), "mobile": (mobile, ("body.0", "body.1", "body.7")),
    "same": (same, ("body.3", "body.6"))}
"""What builds each network, and which of its layers are binary."""


def scattered(model: nn.Module) -> nn.Module:
    """Norms as after a training: gains of both signs and some that are 0, and statistics of their own."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias, std=0.3)
            with torch.no_grad():
                norm.weight[torch.rand(len(norm.weight)) < 0.2] = 0.0
            assert norm.running_mean is not None and norm.running_var is not None
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def rewritten(model: nn.Module, layers: tuple[str, ...], method: ArithmeticMethod, shape: tuple[int, ...]) -> nn.Module:
    """The network whose `layers` are by `method`."""
    graph = trace(model, torch.zeros(shape))
    rewrite(model, Plan(input_shape=shape, layers={name: (method,) for name in layers}), graph)
    return model


def bits_read(model: nn.Module, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The bits that the binary layers of a simulated network read, by node, and its answer."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, layer in arithmetic_layers(model).items():
        def look(module: nn.Module, given: tuple[torch.Tensor, ...], node: str = name.replace(".", "_")) -> None:
            seen[node] = sign_pack(given[0])
        handles.append(layer.register_forward_pre_hook(look))
    with torch.no_grad():
        y = model(x)
    for handle in handles:
        handle.remove()
    return seen, y
