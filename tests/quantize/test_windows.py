"""Windows of a weight: the gradient is that part of the whole one, and only its channels are kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.contract import Needs
from edgetune.errors import PlanError, Refusal
from edgetune.methods.backward.sparse_update import SparseUpdate, read_channels, window_axis
from edgetune.overlap import ConvGeometry
from edgetune.quantize import QuantizedNetwork, Rounded, Stepped, StochasticSGD, integer, last_layers, scale_gradients
from edgetune.quantize.network import Learns
from edgetune.quantize.record import Conv, Quantization
from edgetune.quantize.rules import ConvRule, handle
from geometries import geometries, operands
from integer_nets import odd

ALL = 99
WINDOW = SparseUpdate(channels=3, first=2)
TARGET = torch.tensor([1, 3])


def windowed(graph: object, names: tuple[str, ...]) -> Learns:
    """All learns, but of the layers `names` a window of the weight."""
    learns = last_layers(graph, ALL)
    return {name: (WINDOW, "bias") if name in names else roles for name, roles in learns.items()}


@settings(max_examples=60)
@given(geometry=geometries(max_size=6), seed=st.integers(0, 99), batch=st.integers(1, 2), data=st.data())
def test_of_one_convolution_on_any_geometry(
    geometry: ConvGeometry, seed: int, batch: int, data: st.DataObject
) -> None:
    if geometry.groups > 1 and not geometry.depthwise:
        return  # refused, see below
    axis, channels = window_axis(geometry)
    first = data.draw(st.integers(0, channels - 1))
    method = SparseUpdate(first=first, channels=data.draw(st.integers(1, channels - first)))
    x, weight, gy = operands(geometry, batch, seed)
    x, weight = (x * 60).round().clamp(-128, 127).to(torch.int8), (weight * 50).round().clamp(-127, 127).to(torch.int8)
    bias = torch.zeros(len(weight), dtype=torch.int32)
    m, s = integer.fixed_point(torch.full((len(weight),), 1e-3, dtype=torch.float64))
    layer = Conv(name="c", sources=("input",), shape=(len(weight), *geometry.out_hw), low=-40, high=30,
                 out=Quantization(scale=0.1, zero_point=-20), geometry=geometry)  # fmt: skip
    source = Quantization(scale=0.1, zero_point=-3)
    common = {"bias": bias, "weight_scale": torch.full((len(weight),), 1e-3), "multiplier": m, "shift": s}
    part = weight.narrow(axis, first, method.count(geometry)).double()
    needs, found = Needs((True, False), frozenset({"weight"})), []
    for rule, params in (
        (ConvRule(layer, source), {"weight": weight.double()}),
        (ConvRule(layer, source, method), {"weight": part, "weight.frozen": weight}),
    ):
        (_, y), kept = rule.forward(None, [handle(x.shape, gy), x], {**params, **common}, needs)
        (gx, _), grads = rule.backward(None, kept, [gy], {**params, **common}, needs)
        found.append((y, gx, grads["weight"], kept["x"]))
    (y, gx, gw, _), (y1, gx1, gw1, kept1) = found
    assert torch.equal(y, y1) and torch.equal(gx, gx1)
    torch.testing.assert_close(gw1, gw.narrow(axis, first, method.count(geometry)), rtol=1e-9, atol=1e-12)
    start, stop = read_channels(geometry, first, method.count(geometry))
    assert (kept1.dtype, kept1.shape[1]) == (torch.int8, stop - start)


class TestNetwork:
    @pytest.mark.parametrize("state", [Rounded, Stepped])
    def test_learns_its_window_as_the_whole_weight_does(self, state: type[Rounded]) -> None:
        _, quantized, x = odd()
        names = ("deep.0", "last.0")  # a depthwise convolution, and one over all channels
        whole = QuantizedNetwork(quantized, last_layers(quantized.graph, ALL), state)
        part = QuantizedNetwork(quantized, windowed(quantized.graph, names), state)
        assert torch.equal(whole(x), part(x))
        for network in (whole, part):
            F.cross_entropy(network(x), TARGET).backward()
            scale_gradients(network)
        for layer, ours, theirs in zip(quantized.graph.convs, part.convs(), whole.convs(), strict=True):
            (got,), (want,) = ([p.grad for p in each.weight.parameters()] for each in (ours, theirs))
            axis = window_axis(layer.geometry)[0]
            want = want.narrow(axis, 2, 3) if layer.name in names else want
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7 * float(want.abs().max()))
            assert torch.equal(ours.bias.parameters().__next__().grad, next(theirs.bias.parameters()).grad)

    @pytest.mark.parametrize("state", [Rounded, Stepped])
    def test_only_the_window_moves(self, state: type[Rounded]) -> None:
        _, quantized, x = odd()
        network = QuantizedNetwork(quantized, {"last.0": (WINDOW,)}, state)
        learning = [p for p in network.parameters() if p.requires_grad]
        optimizer = StochasticSGD(network, 1.0) if state is Stepped else torch.optim.SGD(learning, 1.0)
        F.cross_entropy(network(x), TARGET).backward()
        scale_gradients(network)
        optimizer.step()
        learned = network.quantized()
        moved = (learned.tensors["last.0.weight"] != quantized.tensors["last.0.weight"]).any(0).any(-1).any(-1)
        assert moved.tolist() == [False, False, True, True, True, False, False, False]
        assert torch.equal(QuantizedNetwork(learned)(x), network(x).detach())
        fresh = QuantizedNetwork(quantized, {"last.0": (WINDOW,)}, state)
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(x), network(x))

    def test_refuses_what_is_no_window(self) -> None:
        _, quantized, _ = odd()
        with pytest.raises(Refusal, match=r"layer 'wide\.0' has groups=4, and channels of several groups"):
            QuantizedNetwork(quantized, {"wide.0": (WINDOW,)})
        with pytest.raises(Refusal, match=r"layer 'last\.0' has 8 channels to choose from, fewer than the 9"):
            QuantizedNetwork(quantized, {"last.0": (SparseUpdate(channels=3, first=6),)})
        with pytest.raises(Refusal, match=r"layer 'classifier\.1' is a linear layer"):
            QuantizedNetwork(quantized, {"classifier.1": (WINDOW,)})
        with pytest.raises(PlanError, match=r"'last\.0' has several shares of its weight"):
            QuantizedNetwork(quantized, {"last.0": (WINDOW, "weight")})
