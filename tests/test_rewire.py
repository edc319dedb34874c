"""Networks around binary layers: what is swapped, which activations clip, which pools move, and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.apply import rewrite
from edgetune.contract import Plan
from edgetune.errors import PlanError, Refusal
from edgetune.hosts.arithmetic import ArithmeticConv2d, advance, arithmetic_layers
from edgetune.methods.arithmetic.xnor import XNOR


class Pooled(nn.Module):
    """conv - norm - ReLU - pool - conv - norm - ReLU - mean - linear, activations as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


def plan_for(model: nn.Module, x: torch.Tensor, *names: str, method: XNOR | None = None) -> Plan:
    return Plan(input_shape=tuple(x.shape), layers={name: (method or XNOR(),) for name in names})


def kinds(model: nn.Module, x: torch.Tensor) -> list[str]:
    return [call.function if call.kind == "activation" else call.kind for call in et.trace(model, x).calls]


def test_order_becomes_pool_norm_clip_and_binary_convolution() -> None:
    model, x = Pooled().eval(), torch.randn(2, 3, 8, 8)
    before, names = kinds(model, x), list(model.state_dict())
    undo = rewrite(model, plan_for(model, x, "conv2"))
    assert kinds(model, x) == ["input", "conv", "max_pool", "norm", "hardtanh", "arithmetic", "norm", "relu", "mean",
                               "linear", "output"]
    with torch.no_grad():
        mid = F.hardtanh(model.norm1(F.max_pool2d(model.conv1(x), 2)))
        expected = model.head(torch.relu(model.norm2(model.conv2(mid))).mean((2, 3)))
        assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == names
    undo()
    assert kinds(model, x) == before and "forward" not in model.__dict__ and type(model.conv2) is nn.Conv2d


def test_the_same_parameters_learn_and_copies_have_their_own() -> None:
    model, x = Pooled(), torch.randn(2, 3, 8, 8)
    weight = model.conv2.weight
    rewrite(model, plan_for(model, x, "conv2"))
    assert model.conv2.weight is weight and isinstance(model.conv2, ArithmeticConv2d)
    twin = copy.deepcopy(model).train()
    advance(twin, 0.25)
    assert float(twin.conv2.progress) == 0.25 and float(model.conv2.progress) == 1.0
    twin(x).sum().backward()
    assert twin.conv2.weight.grad is not None and weight.grad is None
    assert set(arithmetic_layers(twin)) == {"conv2"}


def test_what_reads_no_activation_gets_no_clip() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.ReLU())
    x = torch.randn(1, 3, 9, 9)
    undo = rewrite(model, plan_for(model, x, "2"))
    assert kinds(model, x) == ["input", "conv", "norm", "arithmetic", "relu", "output"]
    assert "forward" not in model.__dict__
    undo()


def test_pools_that_others_read_stay() -> None:
    class Shared(Pooled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = F.relu(self.norm1(self.conv1(x)))
            return self.head(self.conv2(self.pool(wide)).mean((2, 3)) + wide.mean((2, 3)))

    model, x = Shared().eval(), torch.randn(1, 3, 8, 8)
    rewrite(model, plan_for(model, x, "conv2"))
    assert kinds(model, x)[:5] == ["input", "conv", "norm", "hardtanh", "max_pool"]


def test_rewriting_twice_is_once_and_another_plan_is_refused() -> None:
    model, x = Pooled(), torch.randn(1, 3, 8, 8)
    plan = plan_for(model, x, "conv2")
    assert rewrite(model, plan)
    assert not rewrite(model, plan)
    with pytest.raises(PlanError, match=r"conv2.*another plan"):
        rewrite(model, plan_for(model, x, "conv2", method=XNOR(pad_value=0)))


def test_shared_weights_double_calls_and_untraceable_networks_are_refused_by_name() -> None:
    class Twice(Pooled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.conv2(self.conv2(self.conv1(x)))[:, :3])

    x = torch.randn(1, 3, 8, 8)
    model: nn.Module = Twice()
    with pytest.raises(Refusal, match=r"conv2.*called twice.*--skip conv2"):
        rewrite(model, plan_for(model, x, "conv2"))
    assert type(model.conv2) is nn.Conv2d and "forward" not in model.__dict__
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(Refusal, match="shares its weight"):
        rewrite(model, plan_for(model, x, "1"))
    with pytest.raises(Refusal, match=r"is a norm, not a convolution|is a linear"):
        pooled = Pooled()
        rewrite(pooled, plan_for(pooled, x, "head"))
