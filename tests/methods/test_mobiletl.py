"""MobileTL: the steps of its slope against quadrature, its hosts against autograd, its bytes against stock torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgetune as et
from edgetune.contract import Method, Plan, one_call
from edgetune.errors import PlanError
from edgetune.graph import Call
from edgetune.hosts.gated import GatedConvRule
from edgetune.hosts.segment import SegmentFunction
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.mobiletl import (
    THRESHOLD,
    HardswishRule,
    MobileTL,
    closes_block,
    last_blocks,
    slope_levels,
)
from edgetune.methods.backward.pooled_chain import PooledChain
from edgetune.models import load_model
from edgetune.models.layers import InvertedResidual
from edgetune.models.mobilenet_v3_small import Block
from edgetune.plan import last_layers
from edgetune.profile import measure, profile
from nets import NETS, scramble

Z = torch.linspace(-12, 12, 2_400_001, dtype=torch.float64)
WEIGHT = torch.exp(-Z * Z / 2) / math.sqrt(2 * math.pi) * (Z[1] - Z[0])
SLOPE = torch.where(Z.abs() < 3, Z / 3 + 0.5, (Z > 0).double())


def stepped(a: torch.Tensor, bits: int, threshold: float = THRESHOLD) -> torch.Tensor:
    """The slope that backward takes for the true one, region by region."""
    if bits == 1:
        return (a >= 0).to(a.dtype)
    inner, outer = (torch.tensor(level, dtype=a.dtype) for level in slope_levels(threshold))
    upper = torch.where(a < threshold, inner, outer)
    return torch.where(a >= 0, upper, 1 - torch.where(a > -threshold, inner, outer)).to(a.dtype)


def test_levels_are_the_mean_slope_of_their_regions() -> None:
    for threshold in (0.5, THRESHOLD, 2.0):
        beyond = Z.ge(threshold)
        for level, inside in zip(slope_levels(threshold), (Z.ge(0) & ~beyond, beyond), strict=True):
            assert level == pytest.approx(float((SLOPE * WEIGHT)[inside].sum() / WEIGHT[inside].sum()), abs=1e-5)


def test_the_threshold_has_the_smallest_error_and_two_bits_less_than_one() -> None:
    def error(taken: torch.Tensor) -> float:
        return float(((taken - SLOPE).square() * WEIGHT).sum())

    best = error(stepped(Z, 2))
    assert best < min(error(stepped(Z, 2, THRESHOLD - 0.01)), error(stepped(Z, 2, THRESHOLD + 0.01)))
    assert 7 * best < error(stepped(Z, 1))


@pytest.mark.parametrize("shape", [(2, 3, 7, 5), (1, 1, 1, 1), (3, 4, 1, 9), (0, 2, 3, 3)])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("bits", [1, 2])
def test_hardswish_takes_the_stepped_slope(bits: int, last: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    a = 2 * torch.randn(shape, dtype=torch.float64)
    if a.shape[3] >= 5:
        a[0, 0, 0, :5] = torch.tensor([0.0, -0.0, 4.0, -4.0, 1e-300])
    a = a.contiguous(memory_format=layout).requires_grad_()
    gy = torch.randn(shape, dtype=torch.float64)
    call = Call(name="act", node="act", kind="activation", function="hardswish", inputs=("x",))
    (y,) = SegmentFunction.apply(one_call(HardswishRule(bits), call), a)
    y.backward(gy)
    assert torch.equal(y, F.hardswish(a))
    assert a.grad is not None
    assert torch.allclose(a.grad, gy * stepped(a.detach(), bits), rtol=1e-12, atol=1e-12)


class Excited(nn.Module):
    """Squeeze-excite with the gate first, and ReLU only: nothing of MobileTL is approximate here."""

    def __init__(self, stride: int, groups: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1)
        self.project = nn.Conv2d(4, 6, 3, stride, groups=groups)
        self.close = nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.norm(self.conv(x)))
        return self.close(self.project(F.hardsigmoid(self.fc(self.pool(x))) * x)).mean((2, 3))


def plan_of(graph: et.Graph, learns: dict[str, tuple[str, ...]]) -> Plan:
    return Plan(input_shape=graph.input_shape, layers={c.name: (MobileTL(),) for c in graph.layers("conv")},
                learns=learns)


EVERYTHING = {name: ("weight", "bias") for name in ("conv", "norm", "fc", "project", "close")}


@pytest.mark.parametrize("learns", [EVERYTHING, {"norm": ("bias",)}, {"project": ("weight",)},
                                    {"fc": ("bias",), "project": ("bias",)}, {"project": ("bias",)}])
@pytest.mark.parametrize(("stride", "groups", "batch"), [(1, 1, 3), (2, 2, 1)])
def test_the_product_made_again_gives_autograds_gradients(learns: dict[str, tuple[str, ...]], stride: int,
                                                          groups: int, batch: int) -> None:
    torch.manual_seed(1)
    model = scramble(Excited(stride, groups)).double().eval()
    x = torch.randn(batch, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    expected, gx = {name: p.grad for name, p in model.named_parameters()}, x.grad
    model.zero_grad(set_to_none=True)
    x.grad = None
    plan = plan_of(et.trace(model, x.detach()), learns)
    undo = et.apply(model, plan)
    assert any(isinstance(segment.rule, GatedConvRule) for segment in undo.segments)
    model(x).square().sum().backward()
    assert gx is not None and x.grad is not None and torch.allclose(x.grad, gx, rtol=1e-10, atol=1e-12)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == plan.learned()
    for name, grad in found.items():
        assert torch.allclose(grad, expected[name], rtol=1e-10, atol=1e-12), name


def test_a_network_of_rectifiers_has_exact_gradients() -> None:
    torch.manual_seed(2)
    model = scramble(load_model("mobilenet_v2_0.35", num_classes=5, dropout=0.0)).double().eval()
    x = torch.randn(2, 3, 40, 33, dtype=torch.float64)
    F.cross_entropy(model(x), torch.tensor([1, 3])).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    et.apply(model, last_blocks(et.trace(model, x), 3, MobileTL()))
    F.cross_entropy(model(x), torch.tensor([1, 3])).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, expected[name], rtol=1e-9, atol=1e-12), name


def test_the_last_blocks_learn_and_only_their_last_norms_scale() -> None:
    model = load_model("mobilenet_v3_small", num_classes=5)
    graph = et.trace(model, torch.zeros(1, 3, 64, 64))
    plan = last_blocks(graph, 2, MobileTL(hardswish_bits=1))
    assert {name.split(".")[1] for name in plan.layers} == {"10", "11", "12"}
    assert [name for name in plan.learned() if name.endswith("1.weight") and name.split(".")[-2] == "1"]
    scales = {call.name for call in graph.layers("norm") if "weight" in plan.learns.get(call.name, ())}
    assert scales == {"features.10.block.3.1", "features.11.block.3.1"}
    assert plan.learns["features.12.1"] == ("bias",)
    whole = last_blocks(graph, 11, MobileTL())
    assert whole.layers.keys() == {call.name for call in graph.layers("conv")}
    with pytest.raises(PlanError, match="the network has 11"):
        last_blocks(graph, 12, MobileTL())


def test_a_relu_after_the_add_closes_no_block() -> None:
    graph = et.trace(NETS["Residual"](), torch.zeros(1, 3, 22, 19))
    assert not any(closes_block(graph, call) for call in graph.layers("norm"))
    graph = et.trace(NETS["Inverted"](), torch.zeros(1, 3, 22, 19))
    assert [call.name for call in graph.layers("norm") if closes_block(graph, call)] == ["project.1"]


def block_of(kind: str) -> nn.Module:
    """One inverted residual block, and something that learns in front of it, so that everything is on the way."""
    if kind == "v2":
        return InvertedResidual(16, 16, 1, 6)
    return Block(16, 96, 16, 5, 1, True, nn.Hardswish)


class Framed(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.block = nn.Conv2d(3, 16, 1), block_of(kind)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.first(x)).mean((2, 3))


@pytest.mark.parametrize(("kind", "bits"), [("v2", 2), ("v3", 1), ("v3", 2)])
def test_a_block_keeps_inputs_of_convolutions_and_bits(kind: str, bits: int) -> None:
    model, x = Framed(kind), torch.randn(4, 3, 28, 28)
    graph = et.trace(model, x)
    plan = last_blocks(graph, 1, MobileTL(hardswish_bits=bits))
    predicted = profile(model, x, plan)
    plain = profile(model, x)
    et.apply(model, plan)
    measured = measure(model, x, repeats=1)
    assert measured.layers == predicted.layers
    rows = {layer.name: layer.kept_bytes for layer in measured.layers}
    pixels, small = 4 * 28 * 28, 1500 * 4
    masks = pixels * 2 * 96 // 8 * (bits if kind == "v3" else 1)
    # expansion, depthwise and projection (or what squeeze-excite scales), the last norm's input, masks
    expected = pixels * 4 * (16 + 96 + 96 + 16) + masks
    own = sum(kept for name, kept in rows.items() if name not in ("first", "loss"))
    assert expected <= own <= expected + small
    assert own < 0.4 * sum(layer.kept_bytes for layer in plain.layers if layer.name not in ("first", "loss"))


def test_two_bits_follow_the_gradient_closer_than_one() -> None:
    torch.manual_seed(3)
    model = load_model("mobilenet_v3_small", num_classes=5, dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    x = torch.randn(4, 3, 64, 64)
    model.train()(x)  # norms whose outputs are standard
    model.eval()
    graph = et.trace(model, x)

    def gradient(method: Method) -> torch.Tensor:
        undo = et.apply(model, last_layers(graph, None, method))
        F.cross_entropy(model(x), torch.arange(4)).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        undo()
        return flat

    exact, one, two = (gradient(method) for method in (Exact(), MobileTL(hardswish_bits=1), MobileTL()))
    one_bit, two_bits = (float(F.cosine_similarity(found, exact, 0)) for found in (one, two))
    assert one_bit + 0.05 < two_bits < 1


def test_a_chain_in_front_keeps_its_runs() -> None:
    """Layers of the pooled chain and of MobileTL beside each other: each method finds its own segments."""
    model = scramble(load_model("mobilenet_v3_small", num_classes=5)).eval()
    x = torch.randn(2, 3, 64, 64)
    graph = et.trace(model, x)
    convs = [call.name for call in graph.layers("conv")]
    for cut in (12, 13, 15):
        plan = last_layers(graph, None, MobileTL())
        layers = plan.layers | {name: (PooledChain(),) for name in convs[:cut]}
        undo = et.apply(model, plan.model_copy(update={"layers": layers}))
        chained = {call.name for s in undo.segments if len(s.calls) > 2 for call in s.calls if call.kind == "conv"}
        assert chained == set(convs[:cut])
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        undo()
