"""Adder layers in integers: clamps lose nothing, groups have their scales, kernels give what the formula says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.contract import ArithmeticMethod
from edgetune.hosts.adder import differences
from edgetune.methods.arithmetic.quantized_adder import QuantizedAdder, clusters, redistribute
from edgetune.overlap import ConvGeometry

ONE = torch.ones(())


def geometry(kernel: int = 3, stride: int = 1, pad: int = 1, dilation: int = 1) -> ConvGeometry:
    return ConvGeometry(in_channels=5, out_channels=7, groups=1, in_hw=(8, 6), kernel=(kernel, kernel),
                        stride=(stride, stride), dilation=(dilation, dilation), pads=(pad, pad, pad, 0))


def operands(layer: ConvGeometry, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn((2, 5, 8, 6), generator=source).relu()
    return x, 1.5 * torch.randn((7, 5, *layer.kernel), generator=source)


GEOMETRIES = [(3, 1, 1, 1), (1, 2, 0, 1), (3, 2, 2, 2)]


@given(st.integers(0, 10_000), st.sampled_from([0.3, 1.0, 10.0]), st.sampled_from(GEOMETRIES))
@settings(max_examples=25, deadline=None)
def test_the_clamps_lose_nothing(seed: int, scale: float, how: tuple[int, int, int, int]) -> None:
    layer = geometry(*how)
    x, weight = (t.double() for t in operands(layer, seed))
    within = weight.clamp(0, scale)
    # weights beyond a scale are only exact for inputs within it, and the other way round
    found = differences(x.clamp(max=scale), within, layer) - (weight - within).abs().sum((1, 2, 3)).view(-1, 1, 1)
    assert torch.allclose(found, differences(x.clamp(max=scale), weight, layer), atol=1e-9)
    over = (x - scale).clamp(min=0)
    beyond = -differences(over, torch.zeros_like(weight), layer)
    assert torch.allclose(differences(x.clamp(max=scale), within, layer) - beyond, differences(x, within, layer),
                          atol=1e-9)


def by_the_formula(x: torch.Tensor, weight: torch.Tensor, layer: ConvGeometry, method: QuantizedAdder) -> torch.Tensor:
    """The docstring's, in float64 with steps counted in float32."""
    assert method.range is not None
    steps, levels = redistribute(weight, method.bits, method.groups, method.range), 2**method.bits - 1
    top, bottom, left, right = layer.pads
    columns = F.unfold(F.pad(x, (left, right, top, bottom)), layer.kernel, layer.dilation, 0, layer.stride)
    found = []
    for o, (own, group) in enumerate(zip(weight, steps.group, strict=True)):
        step = steps.step[group]
        read, whole = ((v * step.reciprocal()).round().clamp(0, levels).double()
                       for v in (columns, own.reshape(-1, 1)))
        y, scale = -step.double() * (read - whole).abs().sum(1), levels * step.double()
        y = y - (own.double() - own.double().clamp(min=0).minimum(scale)).abs().sum()
        assert torch.allclose(steps.weight[o].flatten().double(), whole.flatten())
        found.append(y - method.exact * (columns.double() - scale).clamp(min=0).sum(1))
    return torch.stack(found, 1).view(len(x), -1, *layer.out_hw)


@pytest.mark.parametrize("how", [(3, 2, 1, 1), (3, 1, 2, 2), (1, 1, 0, 1), (2, 3, 0, 1)])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_kernels_give_what_the_formula_says(bits: int, exact: bool, how: tuple[int, int, int, int]) -> None:
    layer = geometry(*how)
    x, weight = operands(layer, bits)
    method = QuantizedAdder(bits=bits, groups=3, range=1.7, exact=exact)
    found = method.convolve(x, weight, layer, ONE).double()
    torch.testing.assert_close(found, by_the_formula(x, weight, layer, method), rtol=1e-5, atol=1e-4)


def test_filters_without_a_weight_above_0_are_sums() -> None:
    layer = geometry()
    x, weight = operands(layer, 5)
    found = QuantizedAdder(bits=2, range=1.0).convolve(x, -weight.abs(), layer, ONE)
    torch.testing.assert_close(found, differences(x, -weight.abs(), layer), rtol=1e-5, atol=2e-2)


def test_more_bits_come_closer_and_the_exact_clamp_does_too() -> None:
    layer = geometry()
    x, weight = operands(layer, 1)
    weight = 0.5 * weight
    truth = differences(x, weight, layer)
    errors = [float((QuantizedAdder(bits=b, range=9.0).convolve(x, weight, layer, ONE) - truth).abs().mean())
              for b in (3, 5, 8)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    methods = [QuantizedAdder(bits=7, range=0.8, exact=exact) for exact in (True, False)]
    tight = [float((method.convolve(x, weight, layer, ONE) - truth).abs().mean()) for method in methods]
    assert tight[0] < 0.2 * tight[1]


def test_filters_of_like_range_share_a_scale() -> None:
    values = torch.tensor([0.1, 5.0, 0.12, 5.2, 1.0, 0.11])
    assert clusters(values, 3).tolist() == [0, 2, 0, 2, 1, 0]
    assert len(clusters(torch.ones(4), 3).unique()) == 1
    assert clusters(torch.zeros(0), 2).shape == (0,)
    assert clusters(torch.tensor([1.0, 2.0]), 4).tolist() == [0, 1]


def test_ranges_are_fitted_without_outliers() -> None:
    x = torch.rand(1, 4, 100, 100)
    x[0, 0, 0, 0] = 1000
    found = QuantizedAdder().fitted(x).fitted(2 * torch.rand(1, 4, 100, 100)).fitted(x)
    assert found.range is not None and 1.9 < found.range < 2.0
    assert QuantizedAdder().fitted(torch.zeros(1, 2, 3, 3)).range == 1e-3
    assert QuantizedAdder().fitted(torch.zeros(0, 2, 3, 3)).range == 1e-3
    same: ArithmeticMethod = ArithmeticMethod()
    assert same.fitted(x) is same


def test_a_layer_whose_range_nobody_has_fitted_takes_each_batchs_own() -> None:
    layer = geometry()
    x, weight = operands(layer, 9)
    by_itself = QuantizedAdder(bits=6).convolve(x, weight, layer, ONE)
    assert torch.equal(by_itself, QuantizedAdder(bits=6).fitted(x).convolve(x, weight, layer, ONE))


def test_gradients_are_the_adder_layers() -> None:
    layer = geometry()
    x, weight = (t.requires_grad_() for t in operands(layer, 4))
    QuantizedAdder(bits=4).convolve(x, weight, layer, ONE).sum().backward()
    assert x.grad is not None and x.grad.abs().max() <= 7 * 9
    assert weight.grad is not None and weight.grad.isfinite().all() and bool(weight.grad.any())
