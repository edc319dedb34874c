"""Any network with what it keeps written by a codec: what a slow reference says, and plain autograd without loss."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgetune.codecs import Bounded, Codec, Float32, Int8
from edgetune.contract import CodedMethod
from edgetune.hold import hold
from edgetune.methods.backward.comet import COMET
from edgetune.methods.backward.low_bit import LowBit
from held import NETWORKS, agree, cosine, gradients, naively, network, slowly

ROOM = importlib.import_module("edgetune.hold")  # as an attribute it is the function
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
class TestGradients:
    def test_are_those_of_autograd_where_nothing_is_lost(self, name: str, batch: int) -> None:
        model, x, y = network(name, batch)
        expected = gradients(model, x, y, torch.enable_grad())
        for codec in (Float32(), Bounded(0.0)):
            agree(gradients(model, x, y, hold(model, codec)), expected)

    def test_are_those_of_a_slow_reference(self, name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ROOM, "STATISTIC", 1 << 60)
        model, x, y = network(name, batch)
        expected = gradients(model, x, y, slowly(model, x, Bounded(0.05)))
        agree(gradients(model, x, y, hold(model, Bounded(0.05))), expected)
        assert cosine(expected, gradients(model, x, y, torch.enable_grad())) < 1 - 1e-7  # something was lost


@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_are_counted_by_memory_and_freed_by_backward(name: str) -> None:
    model, x, y = network(name)
    with hold(model, LowBit(bits=4)) as held:
        out = model(x)
    assert held.plain_bytes == naively(model, x, y)
    assert 0 < held.kept_bytes < held.plain_bytes
    F.cross_entropy(out, y).backward()
    del out
    assert (held.kept_bytes, held.plain_bytes) == (0, 0)


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


STEPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu, "relu_": lambda x: torch.relu_(x * 1.5), "gelu": F.gelu, "tanh": torch.tanh, "turned": turned,
    "square": lambda x: x * x.flip(1) / 3, "softmax": lambda x: 9 * x.softmax(1),
    "norm": lambda x: F.layer_norm(x, x.shape[1:]), "views": lambda x: x.sin() * x.view(-1).cos().view(x.shape),
    "chunks": lambda x: torch.cat([a * b.sin() for a, b in zip(x.chunk(3, -1), x.chunk(3, -1)[::-1])], -1),
    "gaps": lambda x: x + (x[:, ::2].cos() * x[:, :1]).mean(1, keepdim=True),
    "spread": lambda x: x * x[:, :, :1].expand(x.shape) * torch.tanh(x.mean()),
    "windows": lambda x: F.pad(x.unfold(2, 2, 1).square().mean(-1), (1, 0)),
    "product": lambda x: x @ (x.transpose(1, 2) @ x) / x.shape[1] / 9, "sigmoid_": lambda x: (x * 2).sigmoid_() * x,
    "filled": lambda x: x.masked_fill(x > 1, 0.5) * (x < 0.7), "half": lambda x: (x.half().square() / 2).float(),
}  # fmt: skip


class Steps(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.first, self.steps = nn.Linear(36, 36), [STEPS[name] for name in names]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return x.tanh().mean((1, 2))


@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=7), batch=st.integers(1, 3),
       rows=st.sampled_from([1, 20]), bound=st.sampled_from([None, 0.0, 0.03]))
@settings(max_examples=80)
def test_random_networks(names: list[str], batch: int, rows: int, bound: float | None) -> None:
    torch.manual_seed(len(names))
    model, x, found = Steps(names), torch.randn(batch, rows, 36), []
    codec = Float32() if bound is None else Bounded(bound)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ROOM, "STATISTIC", 1 << 60)
        for around in (slowly(model, x, codec), hold(model, codec), torch.enable_grad()):
            model.zero_grad()
            with around:
                out = model(x)
            out.square().sum().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    agree(found[1], found[0])
    if not bound:
        agree(found[1], found[2])


MEASURED = [  # network, how, times fewer bytes, cosine
    ("Attending", COMET(), 4.0, 0.998), ("Attending", LowBit(bits=8), 3.5, 0.999), ("Attending", Int8(), 3.5, 0.999),
    ("resnet20", COMET(), 5.0, 0.999), ("resnet20", LowBit(bits=4), 6.0, 0.998), ("resnet20", LowBit(), 11.0, 0.98),
]  # fmt: skip


@pytest.mark.parametrize(("name", "how", "times", "close"), MEASURED)
def test_fewer_bytes_at_nearly_the_same_gradient(name: str, how: CodedMethod | Codec, times: float,
                                                 close: float) -> None:
    model, x, y = network(name, 16)
    expected = gradients(model, x, y, torch.enable_grad())
    around = hold(model, how)
    with around as held:
        out = model(x)
    assert held.plain_bytes > times * held.kept_bytes
    model.zero_grad()
    F.cross_entropy(out, y).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    assert cosine(found, expected) > close
