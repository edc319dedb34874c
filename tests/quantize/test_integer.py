"""The arithmetic against plain Python integers, to the bit, on every geometry."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import integer_reference as reference
from edgetune.errors import EdgetuneError
from edgetune.overlap import ConvGeometry
from edgetune.quantize import integer
from edgetune.quantize.record import Quantization
from geometries import geometries

int32 = st.integers(-(2**31), 2**31 - 1)
scales = st.one_of(st.floats(1e-12, 1), st.integers(0, 34).map(lambda k: 2.0**-k), st.just(1 - 2.0**-40))


def whole(parts: integer.Parts, shape: tuple[int, ...]) -> torch.Tensor:
    """A map from its parts, each number of which must be given once."""
    got, seen = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape, dtype=torch.int32)
    for where, part in parts:
        got[where] = part
        seen[where] += 1
    assert bool((seen == 1).all())
    return got


def how(seed: int) -> Quantization:
    generator = np.random.default_rng(seed)
    return Quantization(scale=float(generator.uniform(0.001, 0.5)), zero_point=int(generator.integers(-128, 128)))


class TestRequantize:
    @given(acc=int32, scale=scales)
    @example(acc=2**31 - 1, scale=1.0)
    @example(acc=-(2**31), scale=1.0)
    @example(acc=3, scale=0.5)
    @example(acc=-3, scale=0.5)
    def test_equals_the_reference(self, acc: int, scale: float) -> None:
        by = integer.fixed_point(torch.tensor([scale], dtype=torch.float64))
        assert int(integer.requantize(torch.tensor([acc]), by)) == reference.requantize(acc, scale)

    @given(acc=int32, scale=scales)
    def test_is_at_most_one_off_the_real_product(self, acc: int, scale: float) -> None:
        by = integer.fixed_point(torch.tensor([scale], dtype=torch.float64))
        # half a unit by each rounding, and the multiplier is good to 31 bits
        assert abs(int(integer.requantize(torch.tensor([acc]), by)) - acc * scale) <= 1.5 + abs(acc) * 2.0**-31

    def test_rounds_twice(self) -> None:
        """Doubling rounds halves up, the shift rounds them away from zero: 3/8 becomes 2/4 and then 1."""
        by = integer.fixed_point(torch.tensor(0.125, dtype=torch.float64))
        assert (int(by[0]), int(by[1])) == (2**30, 2)
        assert integer.requantize(torch.tensor([-5, -4, -3, 3, 4, 5]), by).tolist() == [-1, -1, 0, 1, 1, 1]

    def test_refuses_scales_above_one(self) -> None:
        with pytest.raises(EdgetuneError, match=r"a scale of 1\.5 cannot be a right shift"):
            integer.fixed_point(torch.tensor([0.5, 1.5], dtype=torch.float64))


class TestConv:
    @given(geometry=geometries(max_size=4), seed=st.integers(0, 99), batch=st.integers(1, 2))
    def test_equals_the_reference(self, geometry: ConvGeometry, seed: int, batch: int) -> None:
        random = np.random.default_rng(seed)
        x = random.integers(-128, 128, (batch, geometry.in_channels, *geometry.in_hw))
        weight = random.integers(
            -127, 128, (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
        )
        bias = random.integers(-5000, 5000, geometry.out_channels)
        zero = int(random.integers(-128, 128))
        scale = random.uniform(1e-5, 1e-2, geometry.out_channels)
        acc = reference.conv(x, weight, bias, zero, geometry)
        by = integer.fixed_point(torch.tensor(scale).view(1, -1, 1, 1))
        x, weight, bias = torch.tensor(x).to(torch.int8), torch.tensor(weight).to(torch.int8), torch.tensor(bias).int()
        got = whole(integer.conv(x, weight, bias, zero, geometry, by), acc.shape)
        for n, o, p, q in np.ndindex(*acc.shape):
            assert int(got[n, o, p, q]) == reference.requantize(acc[n, o, p, q], float(scale[o]))

    @given(geometry=geometries(max_size=4), seed=st.integers(0, 99), batch=st.integers(1, 3), run=st.integers(1, 40),
           part=st.integers(1, 40))  # fmt: skip
    def test_is_the_same_however_it_is_cut(
        self, geometry: ConvGeometry, seed: int, batch: int, run: int, part: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator)

        x = integers(-128, 128, batch, geometry.in_channels, *geometry.in_hw).to(torch.int8)
        weight = integers(-127, 128, geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
        bias, scale = integers(-99, 99, len(weight)), torch.rand(1, len(weight), 1, 1, generator=generator) / 99
        operands = (x, weight.to(torch.int8), bias.int(), 3, geometry, integer.fixed_point(scale.double()))
        shape = (batch, geometry.out_channels, *geometry.out_hw)
        at_once = whole(integer.conv(*operands), shape)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(integer, "RUN", run)
            patch.setattr(integer, "PART", part)
            assert torch.equal(whole(integer.conv(*operands), shape), at_once)

    @pytest.mark.parametrize("bias", [0, 2**24])
    def test_is_exact_in_the_worst_case(self, bias: int) -> None:
        """All factors extreme: 1152 taps leave float32's integers, and so does a large bias."""
        geometry = ConvGeometry(in_channels=128, out_channels=1, groups=1, in_hw=(3, 3), kernel=(3, 3), stride=(1, 1),
                                dilation=(1, 1), pads=(0, 0, 0, 0))  # fmt: skip
        x, weight = torch.full((1, 128, 3, 3), 127.0), torch.full((1, 128, 3, 3), 127, dtype=torch.int8)
        weight[0, 0, 0, 0] = 126
        acc = integer.accumulate(x, weight, torch.tensor([bias], dtype=torch.int32), -128, geometry)
        assert acc.dtype == torch.float64
        assert int(acc) == 1151 * 127 * 255 + 126 * 255 + bias

    def test_small_sums_travel_in_float32(self) -> None:
        geometry = ConvGeometry(in_channels=1, out_channels=1, groups=1, in_hw=(1, 1), kernel=(1, 1), stride=(1, 1),
                                dilation=(1, 1), pads=(0, 0, 0, 0))  # fmt: skip
        one = torch.ones(1, 1, 1, 1)
        assert integer.accumulate(one, one, torch.zeros(1), 0, geometry).dtype == torch.float32

    def test_float32_is_not_trusted_where_torch_may_shorten_it(self) -> None:
        geometry = ConvGeometry(in_channels=1, out_channels=1, groups=1, in_hw=(1, 1), kernel=(1, 1), stride=(1, 1),
                                dilation=(1, 1), pads=(0, 0, 0, 0))  # fmt: skip
        one, before = torch.ones(1, 1, 1, 1), torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            assert integer.accumulate(one, one, torch.zeros(1), 0, geometry).dtype == torch.float64
        finally:
            torch.set_float32_matmul_precision(before)

    @given(weight=st.lists(st.integers(-127, 127), min_size=4, max_size=4), bias=st.integers(-999, 999),
           zero=st.integers(-128, 127))  # fmt: skip
    def test_reach_is_the_largest_sum(self, weight: list[int], bias: int, zero: int) -> None:
        extremes = [-128 - zero, 127 - zero]
        largest = max(abs(x) for x in extremes)
        tensors = torch.tensor(weight).view(1, 4, 1, 1), torch.tensor([bias])
        assert integer.reach(*tensors, zero) == sum(abs(w) * largest for w in weight) + abs(bias)


@given(seed=st.integers(0, 999))
def test_add_equals_the_reference(seed: int) -> None:
    random = np.random.default_rng(seed)
    hows = how(seed), how(seed + 1), how(seed + 2)
    x1, x2 = (random.integers(-128, 128, (2, 3, 5, 1)) for _ in range(2))
    got = whole(integer.add(torch.from_numpy(x1), torch.from_numpy(x2), *hows), x1.shape)
    assert got.tolist() == reference.add(x1, x2, *hows).tolist()


@given(seed=st.integers(0, 999))
def test_add_is_the_real_sum_to_the_nearest(seed: int) -> None:
    first, second, out = how(seed), how(seed + 1), how(seed + 2)
    x1, x2 = torch.randint(-128, 128, (2, 2, 10, 10, 5), generator=torch.Generator().manual_seed(seed))
    real = (integer.dequantize(x1.double(), first) + integer.dequantize(x2.double(), second)) / out.scale
    got = whole(integer.add(x1, x2, first, second, out), x1.shape)
    assert (got - real).abs().max() < 0.51


@pytest.mark.parametrize("pixels", [(1, 1), (1, 7), (7, 5)])
def test_mean_is_the_real_mean_to_the_nearest(pixels: tuple[int, int]) -> None:
    source = how(1)
    out = Quantization(scale=source.scale * 1.1 / (pixels[0] * pixels[1]), zero_point=3)
    x = torch.randint(-128, 128, (2, 3, *pixels))
    real = integer.dequantize(x.double(), source).mean((2, 3), keepdim=True) / out.scale
    assert (whole(integer.mean(x, source, out), (2, 3, 1, 1)) - real).abs().max() <= 1.0


def test_mean_of_one_pixel_in_its_own_scale_is_that_pixel() -> None:
    source = how(1)
    x = torch.arange(-128, 128).view(1, 256, 1, 1)
    assert torch.equal(whole(integer.mean(x, source, source), x.shape) + source.zero_point, x)


def test_quantize_rounds_halves_to_even_and_saturates() -> None:
    quantization = Quantization(scale=0.5, zero_point=10)
    x = torch.tensor([-1000.0, -0.75, -0.25, 0.0, 0.25, 0.75, 1000.0])
    assert integer.quantize(x, quantization).tolist() == [-128, 8, 10, 10, 10, 12, 127]
    assert integer.dequantize(torch.tensor([8.0, 10.0]), quantization).tolist() == [-1.0, 0.0]
