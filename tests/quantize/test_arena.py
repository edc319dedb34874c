"""The analytic arena: its lifetimes against a network that runs, its stages against the integers they must give."""

from __future__ import annotations

import weakref
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgetune.methods.backward.sparse_update import SparseUpdate
from edgetune.models import load_model
from edgetune.quantize import Quantized, QuantizedGraph, QuantizedNetwork, Rounded, integer, last_layers, quantize
from edgetune.quantize.arena import added_bytes, extra_bytes, flash_bytes, training_arena
from edgetune.quantize.network import Learns
from edgetune.quantize.record import Add, Conv
from edgetune.quantize.stages import fits_in_place, stages
from edgetune.sparse import released_schemes, scheme_learns
from integer_nets import kept, odd
from packed import overlapping

ALL = 99
SCHEME = released_schemes()["mobilenet_v2_0.35-49KB"]


@pytest.fixture(scope="module")
def mobile() -> Quantized:
    torch.manual_seed(0)
    model = load_model("mobilenet_v2_0.35", num_classes=2).eval()
    return quantize(model, [torch.randn(1, 3, 64, 64)])


def choices(quantized: Quantized) -> dict[str, Learns]:
    graph = quantized.graph
    return {"nothing": {}, "head": last_layers(graph, 0), "biases": last_layers(graph, 0, ALL),
            "last 2": last_layers(graph, 2, 5), "all": last_layers(graph, ALL)}  # fmt: skip


class TestLifetimes:
    """Layer by layer, against autograd at batch 1."""

    def test_maps_live_as_in_the_network(self) -> None:
        _, quantized, x = odd()
        learns = last_layers(quantized.graph, 0, biases=ALL)  # where no weight learns no map is kept
        network, made = QuantizedNetwork(quantized, learns), {}
        arena = training_arena(quantized.graph, learns, streams=False)
        maps = {each.name: each for each in arena.buffers if each.kind == "map"}

        def watch(name: str, moment: int) -> object:
            def hook(module: nn.Module, inputs: object, y: torch.Tensor) -> None:
                made[name] = weakref.ref(getattr(y, "integers", y))
                alive = {each for each, ref in made.items() if ref() is not None}
                planned = {each.name for each in maps.values() if each.first <= moment <= each.last}
                assert alive == planned - {"input"}
            return hook

        for moment, (layer, step) in enumerate(zip(quantized.graph.layers, network.steps, strict=True)):
            step.register_forward_hook(watch(layer.name, moment))
        network(x[:1])
        assert len(made) == len(quantized.graph.layers)

    @pytest.mark.parametrize("what", ["nothing", "head", "biases", "last 2", "all"])
    def test_kept_bytes_are_those_of_autograd(self, what: str) -> None:
        _, quantized, x = odd()
        learns = choices(quantized)[what]
        arena = training_arena(quantized.graph, learns, streams=False)
        turn = len(quantized.graph.layers)  # the first moment of backward
        over = [each for each in arena.buffers if each.first < turn <= each.last and each.name != "classifier.1"]
        features = 12 * 3 if learns else 0  # autograd keeps the head's input in float, a program in int8
        measured = kept(QuantizedNetwork(quantized, learns), x[:1])
        counted = sum(each.size for each in over if each.kind in ("mask", "kept", "map"))
        assert counted == measured - features

    def test_gradients_of_weights_are_all_there_only_where_asked_for(self) -> None:
        _, quantized, _ = odd()
        learns = last_layers(quantized.graph, ALL)
        numbers = sum(p.numel() for p in QuantizedNetwork(quantized, learns, Rounded).parameters() if p.requires_grad)
        for early in (False, True):
            arena = training_arena(quantized.graph, learns, streams=False, update_as_it_comes=early)
            own = [each for each in arena.buffers if each.name.endswith("'s own")]
            assert sum(each.size for each in own) == 4 * numbers
            assert all((each.first == each.last) == early for each in own)
            last = max(each.last for each in arena.buffers)
            assert early or all(each.last == last for each in own)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("network", ["odd", "mobile"])
def test_places_hold(network: str, early: bool, streams: bool, mobile: Quantized) -> None:
    quantized = mobile if network == "mobile" else odd()[1]
    sparse = {"sparse": scheme_learns(mobile, SCHEME)} if network == "mobile" else {}
    for learns in (choices(quantized) | sparse).values():
        arena = training_arena(quantized.graph, learns, update_as_it_comes=early, streams=streams)
        assert overlapping(arena) == []
        assert arena.fullest[1] <= arena.size <= 1.05 * arena.fullest[1]


def test_a_window_counts_its_own_numbers_alone() -> None:
    _, quantized, _ = odd()
    graph, took = quantized.graph, []
    for roles in (("bias",), (SparseUpdate(channels=3), "bias"), ("weight", "bias")):
        took.append(added_bytes(graph, {"last.0": roles}))
    pixels, taps = 6 * 5, 12 * 2 * 3
    assert took[1] - took[0] == 3 * (pixels + taps)
    assert took[2] - took[0] == 8 * (pixels + taps)


def test_each_saving_saves(mobile: Quantized) -> None:
    sparse = scheme_learns(mobile, SCHEME)
    graph = mobile.graph

    def size(learns: Learns, **how: bool) -> int:
        return training_arena(graph, learns, **how).size

    ladder = [
        training_arena(graph, last_layers(graph, ALL), streams=False, update_as_it_comes=False, number_bytes=4).size,
        size(last_layers(graph, ALL), streams=False, update_as_it_comes=False),
        size(sparse, streams=False, update_as_it_comes=False),
        size(sparse, streams=True, update_as_it_comes=False),
        size(sparse),
        size({}),
    ]
    assert ladder == sorted(ladder, reverse=True)
    assert extra_bytes(graph, sparse) == ladder[4] - ladder[5]
    assert extra_bytes(graph, {}) == added_bytes(graph, {}) == 0
    assert flash_bytes(graph) > sum(prod(mobile.tensors[f"{conv.name}.weight"].shape) for conv in graph.convs)


def test_stages_of_mobilenet(mobile: Quantized) -> None:
    kinds = ["-".join(layer.op for layer in stage) for stage in stages(mobile.graph, True)]
    blocks = kinds[:-2]
    assert kinds[-2:] == ["conv-mean", "linear"]
    assert len(blocks) == 17 and set(blocks) == {"conv-conv-conv", "conv-conv-conv-add"}
    assert sum(len(stage) for stage in stages(mobile.graph, True)) == len(mobile.graph.layers)


def block(seed: int, kernels: tuple[int, int], strides: tuple[int, int], residual: bool) -> Quantized:
    """Convolution, depthwise, pointwise, and perhaps an add: one stage."""
    torch.manual_seed(seed)
    out = 4 if residual else 1 + seed % 7

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (k1, k2), (s1, s2) = kernels, strides
            self.a = nn.Conv2d(4, 6, k1, s1, k1 // 2)
            self.b = nn.Conv2d(6, 6, k2, s2, k2 // 2, groups=6)
            self.c = nn.Conv2d(6, out, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
            return x + y if residual else y

    return quantize(Net().eval(), [torch.randn(2, 4, 9, 7)])


def row(quantized: Quantized, layer: Conv, rows: torch.Tensor) -> torch.Tensor:
    """One row of a convolution's result from the rows (k c w) that it reads, padding rows included."""
    g, source = layer.geometry, quantized.graph.quantization(layer.sources[0])
    pads = (0, 0, *g.pads[2:])
    one = g.model_copy(update={"in_hw": (g.kernel[0], g.in_hw[1]), "stride": (1, g.stride[1]), "pads": pads})
    scale = source.scale * quantized.tensors[f"{layer.name}.weight_scale"] / layer.out.scale
    weight, bias = (quantized.tensors[f"{layer.name}.{role}"] for role in ("weight", "bias"))
    by = tuple(each.view(1, -1, 1, 1) for each in integer.fixed_point(scale))
    out = torch.empty(g.out_channels, 1, g.out_hw[1], dtype=torch.int32)
    for (_, channels), part in integer.conv(rows.permute(1, 0, 2)[None], weight, bias, source.zero_point, one, by):
        out[channels] = part[0]
    return (out + layer.out.zero_point).clamp(layer.low, layer.high).to(torch.int8)[:, 0]


def streamed(quantized: Quantized, x: torch.Tensor) -> torch.Tensor:
    """The stage as a program runs it: the result over its own input, of the first map only the depthwise's rows."""
    graph: QuantizedGraph = quantized.graph
    a, b, c = graph.convs
    height, width, channels = a.geometry.in_hw[0], a.geometry.in_hw[1], a.geometry.in_channels
    memory = torch.zeros(4096, dtype=torch.int8)
    memory[: x.numel()] = x.permute(1, 2, 0).flatten()  # h w c

    def read(r: int, how: int) -> torch.Tensor:
        if not 0 <= r < height:
            return torch.full((channels, width), how, dtype=torch.int8)
        return memory[r * width * channels : (r + 1) * width * channels].view(width, channels).t().clone()

    ring: dict[int, torch.Tensor] = {}
    out_channels, (rows, columns) = c.geometry.out_channels, c.geometry.out_hw
    for r in range(rows):
        wanted = [b.geometry.stride[0] * r - b.geometry.pads[0] + u for u in range(b.geometry.kernel[0])]
        for j in [j for j in wanted if 0 <= j < a.geometry.out_hw[0] and j not in ring]:
            first = a.geometry.stride[0] * j - a.geometry.pads[0]
            ring[j] = row(quantized, a, torch.stack([read(first + u, graph.input.zero_point)
                                                     for u in range(a.geometry.kernel[0])]))
            ring.pop(j - b.geometry.kernel[0], None)
        outside = torch.full(a.shape[::2], a.out.zero_point, dtype=torch.int8)
        hidden = row(quantized, b, torch.stack([ring.get(j, outside) for j in wanted]))
        result = row(quantized, c, hidden[None])
        if isinstance(add := graph.layers[-1], Add):
            skip, y = read(r, 0)[None, :, None], result[None, :, None]
            xs = [skip if name == "input" else y for name in add.sources]
            hows = [graph.quantization(name) for name in add.sources]
            for (_, where), part in integer.add(*xs, *hows, add.out):
                result[where] = (part + add.out.zero_point).clamp(add.low, add.high).to(torch.int8)[0, :, 0]
        memory[r * columns * out_channels : (r + 1) * columns * out_channels] = result.t().flatten()
    return memory[: rows * columns * out_channels].view(rows, columns, out_channels).permute(2, 0, 1)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 99), kernels=st.tuples(st.sampled_from([1, 3]), st.sampled_from([1, 3, 5])),
       strides=st.tuples(st.integers(1, 2), st.integers(1, 2)), residual=st.booleans())  # fmt: skip
def test_a_stage_over_its_own_input_gives_the_same_integers(
    seed: int, kernels: tuple[int, int], strides: tuple[int, int], residual: bool
) -> None:
    residual = residual and strides == (1, 1)
    quantized = block(seed, kernels, strides, residual)
    graph = quantized.graph
    (stage,) = stages(graph, True)
    (channels, _, width), (out, _, out_width) = graph.input_shape[1:], graph.layers[-1].shape
    if not fits_in_place(stage, channels * width, out * out_width):
        return
    x = torch.randn(1, 4, 9, 7, generator=torch.Generator().manual_seed(seed))
    last = graph.layers[-1].out
    wanted = (QuantizedNetwork(quantized)(x) / last.scale + last.zero_point).round().to(torch.int8)[0]
    got = streamed(quantized, integer.quantize(x, graph.input).to(torch.int8)[0])
    assert torch.equal(got, wanted)


def test_a_stage_that_would_overwrite_what_it_still_reads_is_not_in_place() -> None:
    def fits(quantized: Quantized) -> bool:
        (stage,), graph = stages(quantized.graph, True), quantized.graph
        (channels, _, width), (out, _, out_width) = graph.input_shape[1:], graph.layers[-1].shape
        return fits_in_place(stage, channels * width, out * out_width)

    assert fits(block(0, (1, 3), (1, 1), residual=True))
    assert not fits(block(0, (3, 1), (1, 1), residual=True))  # row 1 is still read for the hidden row behind
    assert not fits(block(6, (1, 3), (1, 1), residual=False))  # seven channels do not fit over four
