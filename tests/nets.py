"""Small networks that hold every case a chain may meet."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def scramble(model: nn.Module) -> nn.Module:
    """Norms with statistics and affine parameters of their own, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.2)
    return model


def block(i: int, o: int, kernel: int = 3, act: Callable[[], nn.Module] | None = nn.ReLU,
          **options: int) -> nn.Sequential:
    parts = [nn.Conv2d(i, o, kernel, padding=options.pop("padding", kernel // 2), **options), nn.BatchNorm2d(o)]
    return nn.Sequential(*parts, *([act()] if act else []))


class Residual(nn.Module):
    """ReLU after the add, twice on identity shortcuts: masks must be AND-ed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 6)
        self.one, self.two = nn.Sequential(block(6, 6), block(6, 6, act=None)), block(6, 6, act=None)
        self.relu = nn.ReLU(inplace=True)
        self.down, self.short = block(6, 8, stride=2), block(6, 8, 1, act=None, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = self.relu(x + self.one(x))
        out = self.two(x)
        out += x
        x = self.relu(out)
        x = F.relu(self.down(x) + self.short(x))
        return self.head(x.mean([2, 3]))


class Inverted(nn.Module):
    """Depthwise, ReLU6, hard-swish, linear bottleneck add, squeeze-excite, asymmetric 'same' padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 6, act=nn.Hardswish, stride=2)
        self.expand, self.depth = block(6, 12, 1, act=nn.ReLU6), block(12, 12, 5, act=nn.Hardswish, groups=12)
        self.fc1, self.fc2 = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = block(12, 6, 1, act=None)
        self.even = nn.Conv2d(6, 6, 4, padding="same", bias=False, groups=2)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(6, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.depth(self.expand(x))
        gate = F.hardsigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(y, 1)))))
        x = x + self.project(y * gate)
        return self.head(self.pool(F.relu(self.even(x))))


class Stacked(nn.Module):
    """Blocks as submodules: one with squeeze-excite and a shortcut, one that shrinks and writes into its input."""

    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(block(6, 12, 1, act=nn.ReLU6), block(12, 12, 5, act=nn.Hardswish, groups=12))
            self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 4, 1), nn.ReLU(), nn.Conv2d(4, 12, 1))
            self.project = block(12, 6, 1, act=None)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return x + self.project(y * F.hardsigmoid(self.gate(y)))

    class Shrinking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.short = nn.ReLU(inplace=True), block(6, 8, 1, act=None, stride=2)
            self.body = nn.Sequential(block(6, 8, stride=2), nn.Conv2d(8, 8, 3, padding=1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.relu(x)
            return self.body(x) + self.short(x)

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 6, act=nn.Hardswish, stride=2)
        self.stage, self.last = nn.Sequential(Stacked.Excited(), Stacked.Shrinking()), block(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.stage(self.stem(x))).mean([2, 3]))


class Branching(nn.Module):
    """A branch that leaves every run (max-pool, concatenation), and an in-place ReLU whose input others read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = block(3, 4), block(4, 4, padding=0), block(8, 6, dilation=2, padding=2)
        self.pool, self.relu = nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True)
        self.d = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        pooled = self.pool(x)
        x = torch.cat([F.interpolate(self.b(x), pooled.shape[2:]), pooled], 1)
        x = self.c(x)
        z = self.d(x)
        y = self.relu(z)
        return self.head((z * 2 + y).flatten(2).mean(2))


class Opaque(nn.Module):
    """Control flow on data: tracing cannot follow the middle."""

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.act = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.norm(self.conv(x))) if x.sum() > -1e9 else x

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = block(3, 4), Opaque.Middle(), block(4, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.middle(self.first(x))).mean((2, 3)))


class Untraceable(nn.Module):
    """Control flow at the top: only one-layer methods reach in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)) if float(x.mean()) > -1e9 else x)


class SignedBlock(nn.Module):
    """conv -> norm -> ReLU -> conv -> norm, added to the input, then ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.na, self.nb = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.nb(self.b(torch.relu(self.na(self.a(x))))))


class Signed(nn.Module):
    """Two residual blocks, and a plain pair of layers whose pool moves when the last layer reads signs."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.one, self.two = SignedBlock(), SignedBlock()
        self.pair = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                                  nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.pool, self.last, self.head = nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.pair(self.two(self.one(self.stem(x)))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    net.__name__: net for net in (Residual, Inverted, Stacked, Branching, Opaque, Untraceable)}
