"""Binary layers in training against the slow obvious way, in float64: answers, gradients, and what is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.apply import apply, rewrite
from edgetune.contract import Method, Plan, known_methods
from edgetune.hosts.arithmetic import advance
from edgetune.hosts.binary import BinaryMethod, filled, signs_of, trimmed
from edgetune.kernels import sign_pack
from edgetune.methods.arithmetic.dir_net import DIRNet
from edgetune.methods.arithmetic.xnor import XNOR

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1}, {"kernel_size": 1}, {"kernel_size": 5, "padding": 2, "stride": 2},
    {"kernel_size": 3, "dilation": 2, "padding": 1}, {"kernel_size": (2, 3), "padding": (0, 2), "groups": 2},
    {"kernel_size": 3, "padding": "same"}]  # fmt: skip
METHODS = [XNOR(), XNOR(pad_value=0), XNOR(pad_value=-1), XNOR(weights_from=0.5), DIRNet(slope_bits=8),
           DIRNet(alive=0.0, slope_bits=8), XNOR(activations=False), XNOR(input_scale=True)]  # fmt: skip


def layers(options: dict[str, Any], with_norm: bool, seed: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    conv = nn.Conv2d(6, 10, bias=False, **options)
    model = nn.Sequential(nn.Identity(), conv, *([nn.BatchNorm2d(10)] if with_norm else []))
    return model, torch.randn(3, 6, 11, 9)


def plan_of(method: Method, with_norm: bool) -> Plan:
    learns = {"1": ("weight",)} | ({"2": ("weight", "bias")} if with_norm else {})
    return Plan(input_shape=(1, 6, 11, 9), layers={"1": (method,)}, learns=learns, norms="batch")


def trained(model: nn.Module, x: torch.Tensor, r: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    (y * r.to(y.dtype)).sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_kept_bits_train_as_the_layer_itself_does_in_float64(
    options: dict[str, Any], method: BinaryMethod, with_norm: bool
) -> None:
    model, x = layers(options, with_norm, seed=len(str(options)))
    rewrite(model, plan_of(method, with_norm))
    slow = copy.deepcopy(model).double().train()
    for net in (model, slow):
        advance(net, 0.4)
    undo = apply(model, plan_of(method, with_norm))
    model.train()
    r = torch.randn_like(slow(x.double()))
    slow.zero_grad()
    for found, expected in zip(trained(model, x, r), trained(slow, x.double(), r), strict=True):
        # slopes are kept in 8 bits of their range, which is the least exact of all this
        tolerance = 6e-3 if isinstance(method, DIRNet) else 2e-5
        assert float((found - expected).norm() / expected.norm().clamp(min=1e-9)) < tolerance
    undo()


@pytest.mark.parametrize("method", [XNOR(), DIRNet()], ids=str)
def test_a_network_without_gradients_gives_the_same_answer_from_bits(method: BinaryMethod) -> None:
    model, x = layers(GEOMETRIES[0], True, seed=1)
    rewrite(model, plan_of(method, True))
    model.eval()
    with torch.no_grad():
        fast = model(x)
    assert torch.allclose(fast, model(x).detach(), atol=1e-5)


def test_zero_is_plus_one_and_filters_of_zeros_give_zeros() -> None:
    assert signs_of(torch.tensor([0.0, -0.0, 1.0, -1.0])).tolist() == [1, 1, 1, -1]
    model, x = layers(GEOMETRIES[0], False, seed=2)
    nn.init.zeros_(model[1].weight)
    rewrite(model, plan_of(XNOR(), False))
    with torch.no_grad():
        assert torch.equal(model(x), torch.zeros(3, 10, 11, 9))


def test_an_empty_batch_and_a_batch_of_one() -> None:
    model, x = layers(GEOMETRIES[0], False, seed=3)
    apply(model, plan_of(XNOR(), False))
    model.train()
    for batch in (0, 1):
        given = x[:batch].clone().requires_grad_()
        y = model(given)
        assert y.shape == (batch, 10, 11, 9)
        y.sum().backward()
        assert given.grad is not None and given.grad.shape == given.shape


@pytest.mark.parametrize("channels", [1, 8, 13, 64, 65, 128])
def test_bits_are_kept_without_empty_bytes(channels: int) -> None:
    x = torch.randn(2, channels, 3, 5)
    bits = sign_pack(x)
    kept = trimmed(bits, channels)
    assert torch.equal(filled(kept), bits)
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size() <= bits.numel() * 8
    own = -(-channels // 8)
    assert kept.numel() * kept.element_size() == 2 * 3 * 5 * (own if own % 8 else bits.shape[-1] * 8)


def test_training_a_binary_resnet20_keeps_less_than_a_tenth() -> None:
    torch.manual_seed(0)
    model, x = et.load_model("resnet20"), torch.randn(4, 3, 32, 32)
    float_bytes = et.measure(model.train(), x).kept_bytes
    graph = et.trace(model, x)
    plan = Plan(input_shape=tuple(x.shape), norms="batch",
                layers={call.name: (XNOR(),) for call in graph.layers("conv")[1:]},
                learns={call.name: tuple(call.params) for call in graph.layers("conv", "linear")})
    predicted = et.profile(model, x, plan).kept_bytes
    apply(model, plan)
    measured = et.measure(model.train(), x).kept_bytes
    assert measured < float_bytes / 10
    # the first norm is torch's own, which keeps 8 bytes a channel more on meta tensors
    assert predicted - measured in (0, 8 * 16)


def test_running_statistics_and_momentum_are_those_of_the_norm_itself() -> None:
    model, x = layers(GEOMETRIES[0], True, seed=4)
    rewrite(model, plan_of(XNOR(), True))
    twin = copy.deepcopy(model).train()
    apply(model, plan_of(XNOR(), True))
    model.train()
    for _ in range(3):
        model(x), twin(x)
    assert torch.allclose(model[2].running_mean, twin[2].running_mean, atol=1e-5)
    assert torch.allclose(model[2].running_var, twin[2].running_var, rtol=1e-5)


def test_nothing_is_kept_or_computed_for_what_does_not_learn() -> None:
    model, x = layers(GEOMETRIES[0], True, seed=5)
    plan = plan_of(XNOR(), True).model_copy(update={"learns": {"2": ("bias",)}})
    apply(model, plan)
    F.mse_loss(model.train()(x), torch.zeros(3, 10, 11, 9)).backward()
    assert model[1].weight.grad is None and model[2].weight.grad is None and model[2].bias.grad is not None


@pytest.mark.parametrize("kind", ["xnor", "addernet"])
def test_multiply_accumulates_count_alike_whatever_the_arithmetic(kind: str) -> None:
    model, x = layers(GEOMETRIES[0], False, seed=6)
    plan = plan_of(known_methods()[kind](), False)
    forward = et.profile(model, x, None).forward_macs
    cost = et.profile(model, x, plan)
    assert forward == 3 * 10 * 11 * 9 * 6 * 9
    assert cost.forward_macs == forward
    assert cost.backward_macs == forward  # the weight's gradient alone: nothing in front of the layer learns
