"""The host of a frozen norm, alone and with the ReLU behind it, against autograd."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.contract import Plan
from edgetune.profile import measure, profile

ROLES = ((), ("bias",), ("weight",), ("weight", "bias"))
LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Norms(nn.Module):
    """Norms before a ReLU, before a ReLU6, alone, and before a ReLU where another reads the norm as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last = nn.Conv2d(3, 11, 3), nn.Conv2d(11, 11, 1), nn.Conv2d(11, 5, 1)
        self.a, self.b, self.c, self.d = (nn.BatchNorm2d(11) for _ in range(4))
        self.six = nn.ReLU6(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.six(self.b(self.conv(F.relu(self.a(self.first(x))))))
        shared = self.d(self.c(x))
        return self.last(F.relu(shared) + shared).flatten(1)


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(5)
    model = Norms().to(dtype).eval()
    for norm in (model.a, model.b, model.c, model.d):
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(tensor)
        nn.init.uniform_(norm.running_var, 0.3, 2)
    return model


def plan_of(roles: tuple[str, ...], x: torch.Tensor) -> Plan:
    learns = {name: roles for name in "abcd" if roles}
    return Plan(input_shape=tuple(x.shape), learns=learns | {"first": ("weight",), "last": ("bias",)})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("roles", ROLES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_forward_and_gradients_are_autograds(dtype: torch.dtype, roles: tuple[str, ...],
                                             layout: torch.memory_format) -> None:
    model = network(dtype).to(memory_format=layout)
    twin, x = copy.deepcopy(model), torch.randn(3, 3, 9, 8, dtype=dtype).contiguous(memory_format=layout)
    x, other = x.requires_grad_(), x.detach().clone().requires_grad_()
    y = torch.arange(3)
    et.apply(model, plan_of(roles, x))
    out, wanted = model(x), twin(other)
    assert torch.equal(out, wanted)
    F.cross_entropy(out, y).backward()
    F.cross_entropy(wanted, y).backward()
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(x.grad, other.grad, **close)
    exact = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, exact[name].grad, **close)


def test_a_relu_goes_with_the_norm_that_it_alone_reads() -> None:
    model, x = network(), torch.randn(2, 3, 9, 8, dtype=torch.float64)
    segments = et.apply(model, plan_of(("weight", "bias"), x)).segments
    spans = [tuple(call.function for call in segment.calls) for segment in segments]
    assert [span for span in spans if "batch_norm" in span] == [("batch_norm", "relu"), ("batch_norm", "relu6"),
                                                                ("batch_norm",), ("batch_norm",)]


@pytest.mark.parametrize("roles", ROLES, ids=str)
def test_keeps_bits_and_the_input_only_for_a_scale(roles: tuple[str, ...]) -> None:
    model, x = network(torch.float32), torch.randn(2, 3, 9, 8)
    plan = plan_of(roles, x)
    told = profile(model, x, plan)
    et.apply(model, plan)
    took = measure(model, x, repeats=1)
    assert took.layers == told.layers and took.kept_bytes == told.kept_bytes
    kept = {row.name: row.kept_bytes for row in took.layers}
    elements = 2 * 11 * 7 * 6
    assert kept["a"] == kept["b"] == (4 * elements if "weight" in roles else 0)
    assert kept["six"] == -(-elements // 8)


def test_in_half_precision_sums_are_made_in_single() -> None:
    model, x = network(torch.float32), torch.randn(4, 3, 9, 8)
    twin, y = copy.deepcopy(model), torch.arange(4)
    F.cross_entropy(twin(x), y).backward()
    et.apply(model, plan_of(("weight", "bias"), x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.cross_entropy(model(x), y).backward()
    for name in ("a.weight", "b.bias", "c.weight"):
        found, exact = model.get_parameter(name).grad, twin.get_parameter(name).grad
        assert found is not None and exact is not None and found.dtype == torch.float32
        assert F.cosine_similarity(found, exact, 0) > 0.99
