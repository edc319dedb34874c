"""AdderNet as a method: the layer's answer, its gradients through a network, and training that learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.apply import apply
from edgetune.compress import recipe
from edgetune.hosts.arithmetic import ArithmeticConv2d
from edgetune.methods.arithmetic.addernet import AdderNet


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))  # fmt: skip


def planned() -> tuple[nn.Module, torch.Tensor]:
    model, x = small(), torch.randn(6, 3, 9, 9)
    apply(model, recipe(et.trace(model, x), AdderNet()).plan)
    return model, x


def test_only_what_is_no_stem_becomes_an_adder_and_nothing_else_changes() -> None:
    model, x = small(), torch.randn(6, 3, 9, 9)
    made = recipe(et.trace(model, x), AdderNet())
    assert set(made.plan.layers) == {"3"} and set(made.spared) == {"0"}
    apply(model, made.plan)
    kinds = [call.function for call in et.trace(model, x).calls if call.kind in ("activation", "arithmetic")]
    assert kinds == ["relu", "addernet", "relu"]  # no clips: an adder layer reads numbers


def test_the_answer_is_minus_the_distance_of_window_and_filter() -> None:
    model, x = planned()
    layer = model[3]
    assert isinstance(layer, ArithmeticConv2d)
    with torch.no_grad():
        seen = model[:3](x)
        columns = F.unfold(seen, 3, padding=1, stride=2)
        distance = (columns[:, None] - layer.weight.flatten(1)[None, :, :, None]).abs().sum(2)
        assert torch.allclose(layer(seen).flatten(2), -distance, atol=1e-4)


def test_every_layers_weight_gradient_has_the_same_length_a_weight() -> None:
    model, x = planned()
    F.cross_entropy(model.train()(x), torch.arange(6) % 4).backward()
    grad = model[3].weight.grad
    assert grad is not None
    assert float(grad.norm()) == pytest.approx(0.2 * grad.numel() ** 0.5, rel=1e-4)


def test_it_learns_to_tell_pictures_apart() -> None:
    model, x = planned()
    y = torch.arange(6) % 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
