"""A step taken gradient by gradient is the ordinary step, to the bit, and holds fewer gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.contract import Plan
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.plan import last_layers
from edgetune.profile import measure, measured_peak, profile
from edgetune.quantize import QuantizedNetwork, Rounded, Stepped, StochasticSGD, scale_gradients
from edgetune.quantize import last_layers as last_integers
from edgetune.update import as_it_comes
from integer_nets import odd

pytestmark = pytest.mark.usefixtures("one_thread")


class Shared(nn.Module):
    """One convolution is called twice, and a residual add carries gradients around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head((x + self.again(F.relu(self.again(x)))).mean((2, 3)))


def trained(
    model: nn.Module, optimizer: torch.optim.Optimizer, at_once: bool, rescale: Callable[[], object] = lambda: None
) -> dict[str, torch.Tensor]:
    """Three steps."""

    def step(parameter: object = None) -> None:
        rescale()
        optimizer.step()

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(4, 3, 11, 9, generator=generator), torch.tensor([0, 1, 2, 3])
        if at_once:
            with as_it_comes(model, step):
                F.cross_entropy(model(x), y).backward()
            assert all(p.grad is None for p in model.parameters())
        else:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            step()
    return {**model.state_dict(), **{f"{i}": s["momentum_buffer"] for i, s in enumerate(optimizer.state.values())}}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(learned, 0.1, momentum=0.9, weight_decay=1e-3)


def pooled(graph: et.Graph) -> Plan:
    return last_layers(graph, None, PooledChain(patch_px=2), scales=True)


def windows(graph: et.Graph) -> Plan:
    return last_layers(graph, None, Exact()).model_copy(update={"layers": {"first": (SparseUpdate(channels=2),)}})


@pytest.mark.parametrize("plan", [None, pooled, windows])
def test_of_a_float_network(plan: Callable[[et.Graph], Plan] | None) -> None:
    torch.manual_seed(0)
    start, found = Shared().eval(), []
    for at_once in (False, True):
        model = copy.deepcopy(start)
        if plan is not None:
            graph = et.trace(model, torch.zeros(4, 3, 11, 9))
            et.apply(model, plan(graph), graph)
        found.append(trained(model, sgd(model), at_once))
    assert found[0].keys() == found[1].keys()
    # momentum buffers stand in the order in which they were made
    for name in start.state_dict():
        assert torch.equal(found[0][name], found[1][name]), name
    assert not torch.equal(found[0]["first.weight"], start.state_dict()["first.weight"])


@pytest.mark.parametrize("state", [Rounded, Stepped])
def test_of_an_integer_network(state: type[Rounded]) -> None:
    _, quantized, _ = odd()
    learns = {**last_integers(quantized.graph, 99), "last.0": (SparseUpdate(channels=3), "bias")}
    found = []
    for at_once in (False, True):
        network = QuantizedNetwork(quantized, learns, state)
        optimizer = StochasticSGD(network, 0.1, momentum=0.9) if state is Stepped else sgd(network)
        trained(network, optimizer, at_once, lambda network=network: scale_gradients(network))
        found.append(network.quantized().tensors)
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name
    assert not torch.equal(found[0]["first.0.weight"], quantized.tensors["first.0.weight"])


def test_what_goes_wrong_in_a_step_comes_out() -> None:
    model = Shared()
    with pytest.raises(ZeroDivisionError), as_it_comes(model, lambda parameter: 1 // 0):
        model(torch.randn(2, 3, 5, 5)).sum().backward()
    model(torch.randn(2, 3, 5, 5)).sum().backward()  # and afterwards all is as before
    assert all(p.grad is not None for p in model.parameters())


def test_the_peak_falls_by_gradients_and_is_predicted() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.ReLU())]
    model, x = nn.Sequential(nn.Conv2d(3, 64, 3), *layers, nn.Flatten(), nn.Linear(64 * 16, 3)), torch.randn(1, 3, 6, 6)
    one = 4 * 64 * 64 * 9
    costs = {
        (kind.__name__, early): kind(model, x, optimizer_copies=0, update_as_it_comes=early).peak_bytes
        for kind in (profile, measure)
        for early in (False, True)
    }
    for kind in ("profile", "measure"):
        assert 6 * one < costs[kind, False] - costs[kind, True] < 9 * one
    assert costs["profile", True] == pytest.approx(costs["measure", True], rel=0.05)
    assert measured_peak(model, x, optimizer_copies=0, update_as_it_comes=True) == costs["measure", True]
