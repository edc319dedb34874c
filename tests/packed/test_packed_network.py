"""The packed network against the simulated one: the same bits at every binary layer, the same answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from binary_nets import NETS, bits_read, rewritten, scattered
from edgetune.apply import rewrite
from edgetune.compress import recipe
from edgetune.contract import ArithmeticMethod
from edgetune.errors import ModelError
from edgetune.graph import trace
from edgetune.kernels import calls
from edgetune.methods.arithmetic.dir_net import DIRNet
from edgetune.methods.arithmetic.xnor import XNOR
from edgetune.models import digits_net, resnet, resnet20
from edgetune.packed import Packed, PackedNetwork, pack, rounded
from edgetune.packed.layers import BinaryMap, BinarySign, BitPool, Pointwise

METHODS: dict[str, ArithmeticMethod] = {
    "xnor": XNOR(), "xnor_zeros": XNOR(pad_value=0), "dir_net": DIRNet(pad_value=-1)}
SHAPE = (1, 3, 19, 16)


def packed_bits(network: PackedNetwork, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The bits that the binary layers of a packed network read, by layer."""
    seen: dict[str, torch.Tensor] = {}
    handles = [step.register_forward_pre_hook(lambda _, given, name=run[0].name: seen.__setitem__(name, given[0]))
               for run, step in zip(network.runs, network.steps, strict=True)
               if isinstance(run[0], (BinaryMap, BinarySign))]
    network(x)
    for handle in handles:
        handle.remove()
    return seen


def check(model: nn.Module, packed: Packed, x: torch.Tensor) -> None:
    network = PackedNetwork(packed)
    wanted, answer = bits_read(model, x)
    got = packed_bits(network, x)
    assert got.keys() == wanted.keys()
    for name, bits in wanted.items():
        assert torch.equal(got[name], bits), name
    torch.testing.assert_close(network(x), answer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", NETS)
def test_reads_the_same_bits_and_gives_the_same_answer(net: str, method: str) -> None:
    build, layers = NETS[net]
    model = rewritten(scattered(build()), layers, METHODS[method], SHAPE)
    as_float, as_int8 = pack(model, SHAPE, rest="float"), pack(model, SHAPE)
    for n, h, w in ((3, 19, 16), (1, 19, 16), (0, 19, 16), (2, 30, 21)):
        x = torch.randn(n, 3, h, w)
        check(model, as_float, x)
        check(rounded(model), as_int8, x)


@pytest.mark.parametrize("net", ["plain", "residual"])
def test_without_native_kernels(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_functions", dict.fromkeys(
        [(name, dtype) for name in calls.ARGUMENTS for dtype in (torch.float32, torch.bfloat16)]))
    build, layers = NETS[net]
    model = rewritten(scattered(build()), layers, XNOR(), SHAPE)
    check(model, pack(model, SHAPE, rest="float"), torch.randn(2, *SHAPE[1:]))


@pytest.mark.parametrize("method", [XNOR(activations=False), DIRNet(activations=False)], ids=lambda m: m.method)
def test_binary_weights_alone_run_in_float(method: ArithmeticMethod) -> None:
    build, layers = NETS["residual"]
    model = rewritten(scattered(build()), layers, method, SHAPE)
    packed, x = pack(model, SHAPE, rest="float"), torch.randn(2, *SHAPE[1:])
    torch.testing.assert_close(PackedNetwork(packed)(x), model(x), rtol=1e-5, atol=1e-5)
    assert packed.tensors["body_1_conv1.weight"].numel() == 8 * 8 * 9 // 8


def test_a_head_of_several_linear_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8),
                          nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(8 * 4 * 3, 9), nn.ReLU(), nn.Linear(9, 5))
    net = nn.Sequential(OrderedDict(body=scattered(model)))
    shape = (1, 3, 8, 7)
    packed = pack(rewritten(net, ("body.3",), XNOR(), shape), shape)
    for n in (0, 1, 3):
        check(rounded(net), packed, torch.randn(n, *shape[1:]))


def test_scales_of_windows() -> None:
    build, layers = NETS["residual"]
    model = rewritten(scattered(build()), layers, XNOR(input_scale=True), SHAPE)
    # means of |x| are sums in float, in the order of memory
    x = torch.randn(2, *SHAPE[1:]).contiguous(memory_format=torch.channels_last)
    check(model, pack(model, SHAPE, rest="float"), x)


@pytest.mark.parametrize(("build", "shape"), [
    (digits_net.build, (1, 1, 32, 32)), (resnet20.build, (1, 3, 32, 32)),
    (partial(resnet.build, width=0.25), (1, 3, 64, 64))], ids=["digits_net", "resnet20", "resnet18"])
def test_networks_of_the_field_after_a_step(build: Callable[[int], nn.Module], shape: tuple[int, ...]) -> None:
    model = build(10)
    graph = trace(model, torch.zeros(shape))
    rewrite(model, recipe(graph, XNOR()).plan, graph)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    F.cross_entropy(model(torch.randn(16, *shape[1:])), torch.arange(16) % 10).backward()
    optimizer.step()
    model.eval()
    check(rounded(model), pack(model, shape), torch.randn(4, *shape[1:]))


def test_bits_go_from_layer_to_layer() -> None:
    build, layers = NETS["plain"]
    ops = [layer.op for layer in pack(rewritten(scattered(build()), layers, XNOR(), SHAPE), SHAPE).graph.layers]
    assert ops == ["conv", "max_pool", "pointwise", "binary_sign", "bit_pool", "binary_sign", "bit_pool", "binary_map",
                   "pointwise", "mean", "linear"]


@pytest.mark.parametrize(("net", "method", "pairs"), [
    ("residual", XNOR(), 3), ("residual", XNOR(input_scale=True), 0), ("plain", XNOR(), 1), ("two_readers", XNOR(), 2)])
def test_a_convolution_runs_with_the_step_behind_it(net: str, method: ArithmeticMethod, pairs: int) -> None:
    build, layers = NETS[net]
    network = PackedNetwork(pack(rewritten(scattered(build()), layers, method, SHAPE), SHAPE))
    apart = [run[0] for run in network.runs if len(run) == 1]
    assert sum(len(run) == 2 for run in network.runs) == pairs
    assert len(apart) + 2 * pairs == len(network.graph.layers)


def test_a_norm_a_residual_and_a_clip_are_one_step() -> None:
    build, layers = NETS["residual"]
    steps = pack(rewritten(scattered(build()), layers, XNOR(), SHAPE), SHAPE).graph.layers
    joined = [step for step in steps if isinstance(step, Pointwise) and len(step.sources) == 2]
    assert [(step.norm, step.activation, step.map, step.bits) for step in joined] == [
        (True, "hardtanh", True, True), (True, "hardtanh", True, True), (True, "relu", True, False)]


@pytest.mark.parametrize("gain", [1.5, -1.5, 0.0])
@pytest.mark.parametrize("shift", [-40.0, -1.0, -0.0, 0.0, 2.0])
def test_a_threshold_is_right_for_every_sum(gain: float, shift: float) -> None:
    """Filters of +1 on maps that have every number of +1."""
    parts = {"one": nn.Conv2d(6, 2, 1, bias=False), "norm": nn.BatchNorm2d(2), "relu": nn.ReLU(),
             "two": nn.Conv2d(2, 2, 1)}
    for name, value in (("one", 1.0), ("norm", gain), ("two", 1.0)):
        nn.init.constant_(parts[name].weight, value)
    nn.init.constant_(parts["norm"].bias, shift)
    model = rewritten(nn.Sequential(OrderedDict(parts)).eval(), ("one", "two"), XNOR(), (1, 6, 1, 7))
    x = torch.where(torch.arange(6)[:, None] < torch.arange(7), 1.0, -1.0)[None, :, None]
    packed = pack(model, (1, 6, 1, 7))
    check(model, packed, x)
    assert [layer.op for layer in packed.graph.layers] == ["pointwise", "binary_sign", "binary_map"]


def test_a_pool_in_front_of_its_norm_is_one_of_sums() -> None:
    build, layers = NETS["plain"]
    model = rewritten(scattered(build()), layers, XNOR(), SHAPE)
    packed, norm = pack(model, SHAPE), model.get_submodule("body.5.1")
    late, early = (layer for layer in packed.graph.layers if isinstance(layer, BitPool))
    assert (late.name, late.flipped, early.name, early.flipped) == ("body_3", False, "body_6", True)
    assert isinstance(norm, nn.BatchNorm2d)
    assert not bool(packed.of("body_5_0")["flip"].any())
    assert bool(norm.weight[packed.of("body_6")["flip"]].lt(0).all())


def test_a_picture_of_other_channels_is_refused() -> None:
    build, layers = NETS["residual"]
    network = PackedNetwork(pack(rewritten(scattered(build()), layers, XNOR(), SHAPE), SHAPE))
    with pytest.raises(ModelError, match=r"takes pictures \(n 3 h w\) and was given \(1, 4, 8, 8\)"):
        network(torch.zeros(1, 4, 8, 8))
