"""Trained adder networks in fewer bits without training: ranges are fitted, norms estimated anew."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.apply import rewrite
from edgetune.compress import quantize_layers, recipe
from edgetune.errors import PlanError
from edgetune.fit import estimate_norms
from edgetune.hosts.arithmetic import arithmetic_layers
from edgetune.methods.arithmetic.addernet import AdderNet
from edgetune.methods.arithmetic.quantized_adder import QuantizedAdder


def trained() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))  # fmt: skip
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    rewrite(model, recipe(et.trace(model, batches[0]), AdderNet()).plan)
    estimate_norms(model, batches)
    return model.eval(), batches


def test_norms_are_estimated_as_means_over_all_batches() -> None:
    model, batches = trained()
    with torch.no_grad():
        maps = [model[0](x) for x in batches]
    means = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    variances = torch.stack([m.transpose(0, 1).flatten(1).var(1) for m in maps]).mean(0)
    assert torch.allclose(model[1].running_mean, means, atol=1e-5)
    assert torch.allclose(model[1].running_var, variances, rtol=1e-4)
    assert model[1].momentum == 0.1 and not model[1].training


@pytest.mark.parametrize(("bits", "near"), [(8, 0.05), (6, 0.2), (4, 1.0)])
def test_fewer_bits_change_answers_little(bits: int, near: float) -> None:
    model, batches = trained()
    quantized = copy.deepcopy(model)
    quantize_layers(quantized, QuantizedAdder(bits=bits), batches)
    methods = [layer.method for layer in arithmetic_layers(quantized).values()]
    assert all(isinstance(method, QuantizedAdder) and method.range for method in methods)
    with torch.no_grad():
        apart = F.mse_loss(quantized(batches[0]), model(batches[0])).sqrt() / model(batches[0]).std()
    assert float(apart) < near
    assert all(isinstance(layer.method, AdderNet) for layer in arithmetic_layers(model).values())


def test_a_network_without_such_layers_is_refused() -> None:
    with pytest.raises(PlanError, match="compress it first"):
        quantize_layers(nn.Sequential(nn.Conv2d(3, 3, 1)), QuantizedAdder(), [])
