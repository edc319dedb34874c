"""Low-bit kept values: unbiased gradients, kept bytes to the byte."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.contract import Plan
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.low_bit import LowBit
from edgetune.plan import last_layers
from hosts.test_coded import ALL
from nets import scramble

BITS = pytest.mark.parametrize("bits", [2, 4, 8])


def planned(model: nn.Module, x: torch.Tensor, *methods: LowBit) -> Plan:
    plan = last_layers(et.trace(model, x), None, Exact(), scales=True)
    return plan.model_copy(update={"layers": {name: (*stack, *methods) for name, stack in plan.layers.items()}})


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(x), torch.arange(len(x)) % 5).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@BITS
@pytest.mark.parametrize("name", ["Residual", "Branching", "Stem"])
def test_the_mean_of_many_gradients_is_the_exact_one(name: str, bits: int) -> None:
    torch.manual_seed(2)
    model, x, draws = scramble(ALL[name]()), torch.randn(3, 3, 17, 17), 150
    exact, ours = copy.deepcopy(model).double(), copy.deepcopy(model)
    et.apply(exact, planned(exact, x.double()))
    et.apply(ours, planned(ours, x, LowBit(bits=bits)))
    expected, found = gradients(exact, x.double()), [gradients(ours, x) for _ in range(draws)]
    for parameter, gradient in expected.items():
        drawn = torch.stack([each[parameter] for each in found])
        error, spread = (drawn.mean(0) - gradient).norm(), drawn.std(0).norm() / draws**0.5
        assert error < 2 * spread + 1e-5 * gradient.norm() + 1e-9, parameter  # sums of many: near 1 if unbiased


@BITS
@pytest.mark.parametrize("name", sorted(ALL.keys() - {"Opaque", "Untraceable"}))  # those do not run on meta
def test_kept_bytes_are_predicted_to_the_byte(name: str, bits: int) -> None:
    model, x = scramble(ALL[name]()), torch.randn(4, 3, 33, 33)
    plan = planned(model, x, LowBit(bits=bits))
    predicted = et.profile(model, x, plan)
    et.apply(model, plan)
    measured = et.measure(model, x, repeats=1)
    assert predicted.kept_bytes == measured.kept_bytes


def test_fewer_bits_keep_fewer_bytes_beside_any_method() -> None:
    model, x = scramble(ALL["Residual"]()), torch.randn(4, 3, 33, 33)
    plan = last_layers(et.trace(model, x), None, GradientFilter(patch_px=2), scales=True)
    kept = [et.profile(model, x, plan).kept_bytes]
    for bits in (8, 4, 2):
        layers = {name: (*stack, LowBit(bits=bits)) for name, stack in plan.layers.items()}
        kept.append(et.profile(model, x, plan.model_copy(update={"layers": layers})).kept_bytes)
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] / 4
