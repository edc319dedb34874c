"""Runs whose kept values are coded: with a codec that loses nothing gradients are exact; one copy serves all."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.codecs import Codec, Float16, Float32, Int8
from edgetune.contract import CodedMethod, Method, Plan, Segment, Tensors
from edgetune.errors import Refusal
from edgetune.graph import Graph
from edgetune.hosts.coded import coded_runs
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.plan import last_layers
from nets import NETS, block, scramble


class Held(CodedMethod):
    """By a codec of fixed size; nameless, so it is in no list."""

    size: int = 4

    def codec(self, x: torch.Tensor | None, state: Tensors) -> Codec:
        return {4: Float32(), 2: Float16(), 1: Int8()}[self.size]

    @classmethod
    def claim(cls, graph: Graph, plan: Plan) -> list[Segment]:
        return coded_runs(graph, plan, cls, Exact())


class Stem(nn.Module):
    """A norm, ReLU and max-pool in front of a residual block: nothing of the large maps has to be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 6), nn.MaxPool2d(3, 2, 1))
        self.body, self.head = block(6, 6, act=None), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.body(x)).mean((2, 3)))


ALL = {**NETS, "Stem": Stem}


def with_held(plan: Plan, size: int = 4) -> Plan:
    layers = {name: (*stack, Held(size=size)) for name, stack in plan.layers.items()}
    return plan.model_copy(update={"layers": layers})


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def both(name: str, method: Method | None = None, count: int | None = None, scales: bool = True,
         last: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients by the plan, and by the same plan with what is kept held by float32."""
    torch.manual_seed(3)
    model, x = scramble(ALL[name]()), torch.randn(3, 3, 17, 17)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    plan, found = last_layers(et.trace(model, x), count, method or Exact(), scales=scales), []
    for each in (plan, with_held(plan)):
        undo = et.apply(copy.deepcopy(model), each)
        twin = copy.deepcopy(model)
        undo()
        et.apply(twin, each)
        found.append(gradients(twin, x))
    return found[0], found[1]


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        largest = float(expected[name].abs().max())
        assert float((found[name] - expected[name]).abs().max()) <= 5e-5 * (largest + 1e-3), name


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("scales", [False, True], ids=["shifts", "scales"])
@pytest.mark.parametrize("name", ALL)
def test_a_codec_that_loses_nothing_gives_exact_gradients(name: str, scales: bool, last: bool) -> None:
    agree(*reversed(both(name, scales=scales, last=last)))


@pytest.mark.parametrize("method", [GradientFilter(patch_px=2), SparseUpdate(ratio=0.5)], ids=lambda own: own.method)
@pytest.mark.parametrize("name", ALL)
def test_it_stands_beside_any_method(name: str, method: Method) -> None:
    agree(*reversed(both(name, method)))


def test_what_another_method_keeps_its_own_way_is_refused() -> None:
    with pytest.raises(Refusal, match=r"layer 'stem.0'.*another method keeps its values"):
        both("Residual", PooledChain(patch_px=2))


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_a_failure_leaves_nothing_alive(monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    """Bytes that were written, and values that were read, are let go of; the next step is as if nothing had been."""
    model, x = scramble(Stem()), torch.randn(2, 3, 32, 32)
    et.apply(model, with_held(last_layers(et.trace(model, x), None, Exact(), scales=True)))
    wanted = gradients(model, x)
    alive: list[weakref.ref[torch.UntypedStorage]] = []
    with monkeypatch.context() as patch:
        for name, last in (("encode", fails == "forward"), ("decode", fails == "backward")):
            patch.setattr(Float32, name, watched(getattr(Float32, name), alive, last))
        with pytest.raises(MemoryError):
            gradients(model, x)
    gc.collect()
    assert len(alive) >= 2 and all(ref() is None for ref in alive)
    torch.testing.assert_close(gradients(model, x), wanted)


def watched(real: Callable[..., torch.Tensor], alive: list[weakref.ref[torch.UntypedStorage]],
            fails: bool) -> Callable[..., torch.Tensor]:
    """`real` that tells what it made, and `fails` the second time."""
    calls = itertools.count(1)

    def run(*arguments: Any) -> torch.Tensor:
        made = real(*arguments).clone()
        alive.append(weakref.ref(made.untyped_storage()))
        if fails and next(calls) == 2:
            raise MemoryError("no more")
        return made

    return run
