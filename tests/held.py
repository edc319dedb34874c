"""Networks for the tests of `edgetune.hold`, their gradients, and slow versions of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from edgetune.codecs import Codec
from edgetune.contract import CodedMethod
from edgetune.hold import SMALL_BYTES, Held
from edgetune.models import load_model
from nets import NETS, scramble


class Attending(nn.Module):
    """A small vision transformer: patches, a token for the class, attention, layer norms, GELU."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 10)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 65, width))
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True), nn.LayerNorm(width),
                           nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))])
            for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place[:, : x.shape[1] + 1]
        for first, attention, second, mix in self.blocks:
            y = first(x)
            x = x + attention(y, y, y, need_weights=False)[0]
            x = x + mix(second(x))
        return self.head(x[:, 0])


class Odd(nn.Module):
    """Views, gaps, expanded and transposed values, in-place changes, a function of its own, an empty batch of rows."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, x[:, :, ::2])
            return x**3

        @staticmethod
        def backward(ctx: Any, gy: torch.Tensor) -> torch.Tensor:
            x, half = ctx.saved_tensors
            assert half.shape == x[:, :, ::2].shape and torch.allclose(half, x[:, :, ::2], atol=2)
            return 3 * gy * x * x

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(48, 66), nn.Linear(22, 48), nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).reshape(len(x), -1, 48)
        x = self.first(x)
        a, b, c = x[..., :22], x[..., 22:44], x[..., 44:]
        y = F.relu(c.transpose(1, 2), inplace=True).transpose(1, 2) + torch.tanh(a) * b.sigmoid()
        y = Odd.Cube.apply(y) * y[:, :1].expand_as(y) + y[:, 1::3].mean(1, keepdim=True)
        z = torch.tanh(self.second(y))
        z = z.mul(2).exp_() * torch.sin(z)[:, :, :1] + z.new_empty(0, 48).square().sum()
        return self.head(z.softmax(-1).max(1).values)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **NETS, "Attending": Attending, "Odd": Odd, "resnet20": lambda: load_model("resnet20")}


def network(name: str, batch: int = 3) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network in training mode, a batch and its labels."""
    torch.manual_seed(5)
    return scramble(NETWORKS[name]()).train(), torch.randn(batch, 3, 32, 32), torch.arange(batch) % 5


def gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor, around: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    with around:
        out = model(x)
    F.cross_entropy(out, y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def slowly(model: nn.Module, x: torch.Tensor, codec: Codec) -> saved_tensors_hooks:
    """Every saved tensor for itself, as a copy that went through the codec."""
    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}

    def pack(t: torch.Tensor) -> torch.Tensor:
        core = t[tuple(slice(1) if stride == 0 else slice(None) for stride in t.stride())]
        small = core.numel() * t.element_size() <= SMALL_BYTES
        if small or not t.is_floating_point() or t.untyped_storage().data_ptr() in given:
            return t.detach().clone()
        copy = t.detach().clone()
        return copy.copy_(codec.decode(codec.encode(copy.contiguous()), copy.shape))

    return saved_tensors_hooks(pack, lambda t: t)


def naively(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """Bytes of the memories that plain autograd keeps of the forward pass."""
    kept: dict[int, torch.Tensor] = {}
    given = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t.detach())
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in given)


def cosine(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    one, two = (torch.cat([g.flatten() for g in each.values()]).double() for each in (found, expected))
    return float(one @ two / one.norm() / two.norm())


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:  # another memory order sums in another order
        assert float((found[name] - expected[name]).norm()) <= 2e-6 * float(expected[name].norm()) + 1e-9, name


def held_by(codec: Codec | CodedMethod) -> Held:
    return Held(nn.Identity(), codec)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x, "slice": lambda x: x[2:], "columns": lambda x: x[:, 1:9], "steps": lambda x: x[::2, :, ::3],
    "turned": lambda x: x.transpose(0, 2), "channels_last": lambda x: x[None].permute(0, 3, 1, 2),
    "expanded": lambda x: x[:, None, :, None].expand(-1, 3, -1, 2, -1), "one": lambda x: x[1:2],
    "spread": lambda x: x[:, 2:3].expand(-1, 40, -1), "rows": lambda x: x[::2, None, :, :5].expand(2, -1, 7, -1, -1),
    "bent": lambda x: x.permute(1, 2, 0)[3:, ::2], "windows": lambda x: x.unfold(1, 5, 1), "few": lambda x: x[0, :4],
    "flat": lambda x: x.flatten()[7:901], "none": lambda x: x[:0],
}  # fmt: skip
