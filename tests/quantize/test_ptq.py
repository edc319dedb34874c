"""Post-training quantization: what is refused, what becomes of odd calibration data, and the whole net to the bit."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import integer_reference as reference
from edgetune.data import load_data
from edgetune.data.preprocess import Preprocess
from edgetune.errors import DataError, Refusal
from edgetune.graph import trace
from edgetune.models import load_model, load_weights
from edgetune.models.registry import model_card
from edgetune.quantize import MinMax, Percentile, QuantizedNetwork, integer, quantize
from edgetune.quantize.fuse import fuse
from edgetune.quantize.ptq import _clamp, weight_scales
from edgetune.quantize.ranges import choose
from edgetune.quantize.record import Add, Conv, Linear, Mean, Pad, Quantization, Subsample
from integer_nets import SHAPE, odd
from nets import NETS

MAP = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))


class TestWholeNetwork:
    def test_has_the_steps_in_order(self) -> None:
        _, quantized, _ = odd()
        kinds = [type(layer) for layer in quantized.graph.layers]
        assert kinds == [Conv, Conv, Conv, Add, Conv, Subsample, Pad, Add, Mean, Linear]

    @pytest.mark.parametrize("batch", [1, 2])
    def test_equals_plain_integers_to_the_bit(self, batch: int) -> None:
        _, quantized, x = odd()
        logits = QuantizedNetwork(quantized)(x[:batch])
        wanted = reference.run(quantized, x[:batch].numpy())
        # features are equal integers, and only the head's float sums may differ in their order
        torch.testing.assert_close(logits.detach().double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)

    def test_ends_in_a_map_without_a_head(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, bias=False), nn.ReLU6()).eval()
        quantized = quantize(model, [MAP])
        y = QuantizedNetwork(quantized)(MAP)
        out = quantized.graph.layers[-1].out
        wanted = torch.from_numpy(reference.run(quantized, MAP.numpy()).astype(np.int64))
        assert torch.equal(y, integer.dequantize(wanted.float(), out))

    def test_is_near_the_float_network(self) -> None:
        model, quantized, x = odd()
        with torch.no_grad():
            exact = model(x)
            assert (QuantizedNetwork(quantized)(x) - exact).abs().max() < 0.05 * exact.abs().max()

    def test_folds_norm_and_clamp(self) -> None:
        model, quantized, _ = odd()
        first = quantized.graph["first.0"]
        assert isinstance(first, Conv)
        assert (first.low, first.out.zero_point) == (-128, -128)
        six = (first.high - first.out.zero_point) * first.out.scale
        assert first.high == 127 or abs(six - 6) <= first.out.scale / 2
        weight = quantized.tensors["first.0.weight"].double()
        scale = quantized.tensors["first.0.weight_scale"].view(-1, 1, 1, 1)
        conv, norm = model.first[0], model.first[1]
        folded = conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
        assert ((weight * scale - folded).abs() <= scale * 0.5001).all()
        assert (weight.abs().flatten(1).amax(1) == 127).all()


    def test_a_relu6_ends_at_six_where_the_scale_reaches_further(self) -> None:
        graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6()).eval(), MAP)
        (step,) = fuse(graph)
        assert _clamp(step, Quantization(scale=0.1, zero_point=-128)) == (-128, -68)
        assert _clamp(step, Quantization(scale=0.02, zero_point=-100)) == (-100, 127)


class TestScales:
    def test_zero_has_an_integer(self) -> None:
        for seen in [(-1.0, 3.0), (2.0, 5.0), (-4.0, -1.0), (0.0, 6.0)]:
            how = choose(seen, 0.0, 1.0)
            low, high = how.scale * (-128 - how.zero_point), how.scale * (127 - how.zero_point)
            assert low - how.scale <= min(seen[0], 0) + 1e-9 and high + how.scale >= max(seen[1], 0) - 1e-9
        assert choose((0.0, 6.0), 0.0, 1.0).zero_point == -128

    def test_a_map_of_zeros_gets_the_range_it_is_given(self) -> None:
        assert choose((0.0, 0.0), 0.0, 5.1).scale == pytest.approx(0.02)
        assert choose((0.0, 1e-9), 0.5, 1.0).scale == pytest.approx(0.5)

    def test_a_filter_of_zeros_takes_the_coarsest(self) -> None:
        weight = torch.tensor([127.0, 0.0, 12.7], dtype=torch.float64).view(3, 1, 1, 1)
        assert weight_scales(weight, torch.zeros(3), 0.1).tolist() == pytest.approx([1, 1, 0.1])
        assert weight_scales(0 * weight, torch.zeros(3), 0.1).tolist() == pytest.approx([1 / 127] * 3)

    def test_a_bias_never_leaves_its_range(self) -> None:
        scale = weight_scales(torch.full((1, 1, 1, 1), 1e-12).double(), torch.tensor([3.0]).double(), 1e-3)
        assert round(3.0 / (float(scale) * 1e-3)) <= 2**24

    def test_percentile_leaves_out_the_tails(self) -> None:
        x = torch.arange(10001.0)
        assert MinMax().batch(x) == (0, 10000)
        assert Percentile(keep_percent=99).batch(x) == (50, 9950)
        assert Percentile(keep_percent=100).batch(x) == (0, 10000)
        assert Percentile().together([(0.0, 2.0), (-2.0, 4.0)]) == (-1, 3)
        assert MinMax().together([(0.0, 2.0), (-2.0, 4.0)]) == (-2, 4)


@pytest.mark.parametrize("ranges", [MinMax(), Percentile()])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_calibration_gives_a_network_that_works(value: float, ranges: MinMax) -> None:
    model, _, x = odd()
    network = QuantizedNetwork(quantize(model, [torch.full(SHAPE, value)], ranges))
    logits = network(x).detach()
    assert logits.isfinite().all()
    assert logits[0].ne(logits[1]).any(), "pictures must not all look the same"


def test_weights_of_zero_and_dead_maps_give_a_network_that_works() -> None:
    model, _, x = odd()
    for tensor in (model.wide[0].weight, model.wide[0].bias, model.deep[0].weight):
        tensor.data.zero_()
    model.first[1].bias.data.fill_(-50)
    assert QuantizedNetwork(quantize(model, [x]))(x).isfinite().all()


class Functional(nn.Module):
    """Layers and a function of them, for networks that must be refused."""

    def __init__(self, function: Callable[..., torch.Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


CONV, NORM = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
HEAD = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
REFUSED = {
    "no integer step": (nn.Sequential(CONV, nn.MaxPool2d(2)), "layer '1' is a max_pool2d, which has no integer step"),
    "smooth": (nn.Sequential(CONV, nn.Hardswish()), "layer '1' is a hardswish, which is no clamp"),
    "norm alone": (nn.Sequential(NORM, CONV), "layer '0' does not stand behind a convolution"),
    "norm read by others": (
        Functional(lambda self, x: (y := self.conv(x)) + self.norm(y), conv=CONV, norm=NORM),
        "layer 'norm' does not stand behind a convolution that it alone reads",
    ),
    "clamp alone": (nn.Sequential(nn.ReLU(), CONV), "layer '0' does not stand behind a convolution or an add"),
    "linear twice": (nn.Sequential(*HEAD, nn.Linear(3, 2)), "layer '3' reads the linear layer '2'"),
    "called twice": (Functional(lambda self, x: self.conv(self.conv(x)), conv=CONV), "layer 'conv' is called twice"),
    "in place": (
        Functional(lambda self, x: (y := self.conv(x)).add_(x) + y, conv=CONV),
        "layer 'add_' changes in place what is read again later",
    ),
    "not followed at all": (
        Functional(lambda self, x: self.conv(x) if x.sum() > -1e9 else x, conv=CONV),
        "layer 'conv' cannot be followed (TraceError: ",
    ),
    "computed beside": (
        Functional(lambda self, x: (self.a(x), self.b(x))[0], a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 2, 1)),
        "is not the way from one picture to one result",
    ),
    "not followed": (
        nn.Sequential(Functional(lambda self, x: self.conv(x) if x.sum() > -1e9 else x, conv=CONV), CONV),
        "layer '0' cannot be followed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_with_the_reason(name: str) -> None:
    model, complaint = REFUSED[name]
    with pytest.raises(Refusal) as refusal:
        quantize(model.eval(), [MAP])
    assert complaint in str(refusal.value)
    assert refusal.value.way_out


@pytest.mark.parametrize("inner", [nn.ReLU(inplace=True), nn.Identity()])
def test_takes_in_place_calls_that_no_one_reads_behind(inner: nn.Module) -> None:
    def function(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(self.a(x))
        x += self.b(x)
        return x

    model = Functional(function, inner=inner, a=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 3, 3, padding=1)).eval()
    with torch.no_grad():
        wanted, got = model(MAP), QuantizedNetwork(quantize(model, [MAP]))(MAP)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_takes_residual_blocks_of_every_spelling() -> None:
    model, x = NETS["Residual"]().eval(), torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        wanted, got = model(x), QuantizedNetwork(quantize(model, [x]))(x)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_refuses_to_calibrate_with_nothing_or_no_numbers() -> None:
    model, _, x = odd()
    with pytest.raises(DataError, match="no picture to calibrate with"):
        quantize(model, [])
    with pytest.raises(DataError, match="no number at 'x'"):
        quantize(model, [x * float("nan")])


def test_takes_a_graph_that_was_traced_before_and_leaves_the_model_alone() -> None:
    model, quantized, x = odd()
    model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    again = quantize(model, [x], graph=trace(model, x[:1]))
    assert [layer.name for layer in again.graph.layers] == [layer.name for layer in quantized.graph.layers]
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@torch.no_grad()
def agreement(name: str, weights: Path, pictures: torch.Tensor, calibrate: torch.Tensor) -> float:
    """Share of pictures for which the float and the integer network say the same."""
    model = load_model(name)
    load_weights(model, weights)
    network = QuantizedNetwork(quantize(model.eval(), calibrate.split(16)))
    return float((model(pictures).argmax(1) == network(pictures).argmax(1)).double().mean())


def test_resnet20_says_the_same_in_integers(shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = shared("weights/resnet20_cifar10.safetensors")
    monkeypatch.setenv("EDGETUNE_DATA", str(shared("cifar10_jpeg.npz").parent))
    data = load_data("cifar10", Preprocess.from_input(model_card("resnet20").input), limit=64)
    pictures, calibrate = (torch.stack([part[i][0] for i in range(64)]) for part in (data.val, data.train))
    assert agreement("resnet20", weights, pictures, calibrate) >= 60 / 64


@pytest.mark.slow
def test_mobilenet_v2_says_the_same_in_integers(shared: Callable[[str], Path]) -> None:
    weights = shared("weights/mobilenet_v2_1.0_224_imagenet1001_dequant.safetensors")
    folder = shared("imagenet_samples_256")
    preprocess = Preprocess.from_input(model_card("mobilenet_v2_tf").input)
    with (folder / "labels.csv").open() as file:
        names = [row["file"] for row in csv.DictReader(file)][::16]
    pictures = torch.stack([preprocess.apply(Image.open(folder / name).convert("RGB")) for name in names])
    assert agreement("mobilenet_v2_tf", weights, pictures[:16], pictures[16:]) >= 14 / 16
