"""Training: gradients against autograd of the straight-through graph in float64, bytes kept, and back to a record."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgetune.contract import Needs
from edgetune.errors import ModelError, PlanError, Refusal
from edgetune.overlap import ConvGeometry
from edgetune.profile import measured_peak
from edgetune.quantize import Quantized, QuantizedNetwork, Rounded, Stepped, integer, last_layers, quantize
from edgetune.quantize.network import QuantizedConv
from edgetune.quantize.record import Add, Conv, Linear, Mean, Pad, Quantization, Subsample
from edgetune.quantize.rules import ConvRule, handle
from geometries import geometries, operands
from integer_nets import kept, odd

ALL = 99


def straight_through(value: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """`exact` forward, the gradient of `value` backward."""
    return value + (exact - value).detach()


def gathered(parts: integer.Parts, like: torch.Tensor) -> torch.Tensor:
    """A map from its parts."""
    got = torch.empty_like(like)
    for where, part in parts:
        got[where] = part.to(like.dtype)
    return got


def convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layer: Conv, source: Quantization,
              scale: torch.Tensor) -> torch.Tensor:
    """The simulated convolution: rounding is the identity to autograd."""
    top, bottom, left, right = layer.geometry.pads
    w, b = straight_through(weight, weight.round().clamp(-127, 127)), straight_through(bias, bias.round())
    padded = F.pad(x - source.zero_point, (left, right, top, bottom))
    g = layer.geometry
    acc = F.conv2d(padded, w, b, g.stride, 0, g.dilation, g.groups)
    by = integer.fixed_point(scale.view(1, -1, 1, 1))
    before = straight_through(acc * scale.view(1, -1, 1, 1), integer.requantize(acc.detach().long(), by).double())
    return (before + layer.out.zero_point).clamp(layer.low, layer.high)


def simulated(quantized: Quantized, x: torch.Tensor, learned: dict[str, torch.Tensor]) -> torch.Tensor:
    """The whole network as autograd sees it, float64; `learned` are its weights and biases by key."""
    graph = quantized.graph
    maps = {"input": integer.quantize(x, graph.input)}
    for layer in graph.layers:
        xs, hows = [maps[n] for n in layer.sources], [graph.quantization(n) for n in layer.sources]
        weight, bias = learned.get(f"{layer.name}.weight"), learned.get(f"{layer.name}.bias")
        match layer:
            case Conv():
                scale = hows[0].scale * quantized.tensors[f"{layer.name}.weight_scale"] / layer.out.scale
                maps[layer.name] = convolved(xs[0], weight, bias, layer, hows[0], scale)
            case Add():
                real = sum(integer.dequantize(each, how) for each, how in zip(xs, hows)) / layer.out.scale
                exact = gathered(integer.add(*(each.detach() for each in xs), *hows, layer.out), real)
                before = straight_through(real, exact) + layer.out.zero_point
                maps[layer.name] = before.clamp(layer.low, layer.high)
            case Mean():
                real = integer.dequantize(xs[0], hows[0]).mean((2, 3), keepdim=True) / layer.out.scale
                before = straight_through(real, gathered(integer.mean(xs[0].detach(), hows[0], layer.out), real))
                maps[layer.name] = (before + layer.out.zero_point).clamp(layer.low, layer.high)
            case Subsample():
                maps[layer.name] = xs[0][:, :, :: layer.stride[0], :: layer.stride[1]]
            case Pad():
                maps[layer.name] = F.pad(xs[0], (0, 0, 0, 0, layer.before, layer.after), value=layer.out.zero_point)
            case Linear():
                return F.linear(integer.dequantize(xs[0], hows[0]).flatten(1), weight, bias)
    raise AssertionError("the test network has a head")


def tightened(quantized: Quantized) -> Quantized:
    """The same network with clamps so tight that every one of them cuts."""
    layers = [layer.model_copy(update={"low": max(layer.low, -90), "high": 10}) if isinstance(layer, (Conv, Add, Mean))
              else layer for layer in quantized.graph.layers]  # fmt: skip
    return Quantized(quantized.graph.model_copy(update={"layers": tuple(layers)}), quantized.tensors)


def learning(network: QuantizedNetwork) -> dict[str, torch.Tensor]:
    """The parameters by key of the record."""
    return {
        f"{layer.name}.{role}": held.value if isinstance(step, QuantizedConv) else held
        for layer, step in zip(network.graph.layers, network.steps)
        if isinstance(layer, (Conv, Linear))
        for role, held in (("weight", step.weight), ("bias", step.bias))
    }


class TestGradients:
    @pytest.mark.parametrize("tight", [False, True])
    def test_equal_autograd_of_the_simulated_network(self, tight: bool) -> None:
        _, quantized, x = odd()
        quantized = tightened(quantized) if tight else quantized
        network = QuantizedNetwork(quantized, last_layers(quantized.graph, ALL)).double()
        parameters = learning(network)
        with torch.no_grad():
            for parameter in parameters.values():  # fractions, which the forward pass must round away
                parameter.add_(torch.rand_like(parameter) - 0.5)
        twins = {key: p.detach().clone().requires_grad_() for key, p in parameters.items()}
        x, target = x.double(), torch.tensor([1, 3])
        ours, theirs = network(x), simulated(quantized, x, twins)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        F.cross_entropy(ours, target).backward()
        F.cross_entropy(theirs, target).backward()
        for key, twin in twins.items():
            assert twin.grad.abs().max() > 0, key
            torch.testing.assert_close(parameters[key].grad, twin.grad, rtol=1e-9, atol=1e-15, msg=key)

    @settings(max_examples=60)
    @given(geometry=geometries(max_size=6), seed=st.integers(0, 99), batch=st.integers(1, 2))
    def test_of_one_convolution_on_any_geometry(self, geometry: ConvGeometry, seed: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x, weight, gy = operands(geometry, batch, seed)
        x, weight = (x * 60).round().clamp(-128, 127), (weight * 50).clamp(-127, 127)
        bias = 100 * torch.randn(len(weight), generator=generator, dtype=torch.float64)
        scale = 1e-3 * (0.5 + torch.rand(len(weight), generator=generator, dtype=torch.float64))
        out = Quantization(scale=0.1, zero_point=-20)
        shape = (geometry.out_channels, *geometry.out_hw)
        layer = Conv(name="c", sources=("input",), shape=shape, out=out, low=-40, high=30, geometry=geometry)
        source = Quantization(scale=0.1, zero_point=-3)
        tensors = [t.requires_grad_() for t in (x, weight, bias)]
        wanted = torch.autograd.grad(convolved(*tensors, layer, source, scale), tensors, gy)
        rule, (m, s) = ConvRule(layer, source), integer.fixed_point(scale)
        # both maps have one scale, so that the weight's is the whole
        params = {"weight": weight, "bias": bias, "weight_scale": scale, "multiplier": m, "shift": s}
        needs = Needs((True, False), frozenset({"weight", "bias"}))
        detached = {name: tensor.detach() for name, tensor in params.items()}
        (like, y), kept = rule.forward(None, [handle(x.shape, x), x.detach().to(torch.int8)], detached, needs)
        assert torch.equal(y.double(), convolved(x, weight, bias, layer, source, scale).detach())
        assert (like.shape, like.untyped_storage().nbytes()) == (y.shape, 8)
        (gx, _), grads = rule.backward(None, kept, [gy], detached, needs)
        for got, want in zip((gx, grads["weight"], grads["bias"]), wanted):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)

    def test_integer_state_has_the_same_gradients(self) -> None:
        _, quantized, x = odd()
        learns, gradients = last_layers(quantized.graph, ALL), []
        for state in (Rounded, Stepped):
            network = QuantizedNetwork(quantized, learns, state)
            F.cross_entropy(network(x), torch.tensor([1, 3])).backward()
            gradients.append([p.grad for p in network.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)

    def test_cannot_be_differentiated_twice(self) -> None:
        _, quantized, x = odd()
        network = QuantizedNetwork(quantized, last_layers(quantized.graph, 1))
        with pytest.raises(Refusal, match="cannot be differentiated again"):
            torch.autograd.grad(network(x).sum(), list(network.parameters())[-3:], create_graph=True)


def bits(*shapes: tuple[int, ...]) -> int:
    return sum(-(-torch.Size(shape).numel() // 8) for shape in shapes)


class TestKept:
    """Batch 2 of the odd network: maps 8x6x5 up to the last convolution, then 12x3x3; 12 features."""

    head = 2 * 12 * 4
    tail = bits((2, 12, 3, 3), (2, 12, 1, 1))  # the last add and the mean

    @pytest.mark.parametrize("state", [Rounded, Stepped])
    def test_weight_and_bias_of_the_last_convolution(self, state: type[Rounded]) -> None:
        _, quantized, x = odd()
        network = QuantizedNetwork(quantized, last_layers(quantized.graph, 1), state)
        assert kept(network, x) == 2 * 8 * 6 * 5 + bits((2, 12, 3, 3)) + self.tail + self.head

    def test_biases_alone_keep_bits_alone(self) -> None:
        _, quantized, x = odd()
        network = QuantizedNetwork(quantized, last_layers(quantized.graph, 0, biases=2))
        convs = bits((2, 8, 6, 5), (2, 12, 3, 3))
        assert kept(network, x) == convs + bits((2, 8, 6, 5)) + self.tail + self.head

    def test_the_head_alone_keeps_its_features(self) -> None:
        _, quantized, x = odd()
        assert kept(QuantizedNetwork(quantized, last_layers(quantized.graph, 0)), x) == self.head

    def test_nothing_learns_nothing_is_kept(self) -> None:
        _, quantized, x = odd()
        network = QuantizedNetwork(quantized)
        assert not network(x).requires_grad
        assert kept(network, x) == 0


def test_maps_live_only_until_they_are_read() -> None:
    _, quantized, x = odd()
    learns = last_layers(quantized.graph, 0, biases=ALL)  # a weight that learns keeps the map that it reads
    network, made, alive = QuantizedNetwork(quantized, learns), [], []

    def watch(module: torch.nn.Module, inputs: object, y: torch.Tensor) -> None:
        alive.append([number for number, ref in enumerate(made) if ref() is not None])
        made.append(weakref.ref(getattr(y, "integers", y)))

    for step in network.steps:
        step.register_forward_hook(watch)
    network(x)
    # by number of step: 0 1 2 convolutions, 3 add, 4 convolution, 5 every second pixel, 6 zero channels, 7 add, 8 mean
    assert alive == [[], [0], [0, 1], [0, 2], [3], [3, 4], [4, 5], [4, 6], [7], [8]]


def test_a_frozen_network_holds_two_int8_maps_and_parts() -> None:
    """The parts are 3.3 bytes a number here: their size is fixed, and a library pads few channels to more."""
    model = nn.Sequential(nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2)).eval()  # fmt: skip
    x = torch.randn(1, 3, 64, 64)
    network, numbers = QuantizedNetwork(quantize(model, [x])), 64 * 64 * 64
    assert 2 * numbers < measured_peak(network, x) < 8 * numbers  # in floats the two maps alone are 8


class TestLearns:
    def test_only_what_is_named_learns(self) -> None:
        _, quantized, _ = odd()
        network = QuantizedNetwork(quantized, {"last.0": ("weight",), "classifier.1": ("bias",)})
        names = {name for name, p in network.named_parameters() if p.requires_grad}
        assert names == {"steps.4.weight.value", "steps.9.bias"}

    def test_last_layers(self) -> None:
        _, quantized, _ = odd()
        assert last_layers(quantized.graph, 1, biases=2) == {
            "last.0": ("weight", "bias"),
            "deep.0": ("bias",),
            "classifier.1": ("weight", "bias"),
        }

    def test_refuses_what_is_not_there(self) -> None:
        _, quantized, x = odd()
        with pytest.raises(PlanError, match="layer 'add' cannot learn"):
            QuantizedNetwork(quantized, {"add": ("weight",)})
        with pytest.raises(PlanError, match=r"layer 'last\.0' has no 'scale'"):
            QuantizedNetwork(quantized, {"last.0": ("scale",)})
        with pytest.raises(ModelError, match=r"quantized for pictures \(3, 11, 9\) and was given \(3, 9, 9\)"):
            QuantizedNetwork(quantized)(x[:, :, :9])


@pytest.mark.parametrize("state", [Rounded, Stepped])
def test_goes_back_to_a_record(state: type[Rounded]) -> None:
    _, quantized, x = odd()
    network = QuantizedNetwork(quantized, last_layers(quantized.graph, ALL), state)
    unchanged = network.quantized()
    assert all(torch.equal(unchanged.tensors[key], tensor) for key, tensor in quantized.tensors.items())
    with torch.no_grad():
        for conv in network.convs():
            if isinstance(conv.weight, Stepped):
                conv.weight.move(torch.full_like(conv.weight.handle, 3.0))
            else:
                conv.weight.value.add_(2.75)
    learned = network.quantized()
    moved = quantized.tensors["last.0.weight"].int() + 3
    assert torch.equal(learned.tensors["last.0.weight"].int(), moved.clamp(-127, 127))
    assert torch.equal(QuantizedNetwork(learned)(x), network(x))


@pytest.mark.parametrize("state", [Rounded, Stepped])
def test_goes_through_a_state_dict(state: type[Rounded]) -> None:
    _, quantized, x = odd()
    learns = last_layers(quantized.graph, 2)
    trained, fresh = (QuantizedNetwork(quantized, learns, state) for _ in range(2))
    with torch.no_grad():
        for conv in trained.convs():
            conv.weight.value.add_(1)
    assert not torch.equal(fresh(x), trained(x))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained(x))
    assert any(p.requires_grad for p in next(reversed(list(fresh.convs()))).parameters())


def test_autocast_leaves_the_integers_alone() -> None:
    _, quantized, x = odd()
    body = quantized.graph.layers[:-1]
    tensors = {key: t for key, t in quantized.tensors.items() if not key.startswith("classifier")}
    network = QuantizedNetwork(Quantized(quantized.graph.model_copy(update={"layers": body}), tensors))
    wanted = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x), wanted)


def test_gives_the_same_without_gradients() -> None:
    _, quantized, x = odd()
    network = QuantizedNetwork(quantized, last_layers(quantized.graph, ALL))
    with torch.no_grad():
        y = network(x)
    assert torch.equal(y, network(x).detach())
    assert not y.requires_grad
