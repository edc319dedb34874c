"""Codes in groups: sizes, bounds, chance without bias, and what can't be written."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coded import holds, there_and_back
from edgetune.codecs import Grouped
from edgetune.errors import EdgetuneError
from edgetune.kernels import fallback, group_pack

BITS = pytest.mark.parametrize("bits", [8, 4, 2])
SHAPES = [(1,), (0, 3), (5, 0, 2, 2), (2, 3, 5), (1, 255), (1, 256), (1, 257), (3, 7, 9, 11), (64, 32)]


@BITS
@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bound_holds_on_every_shape(bits: int, stochastic: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(bits + len(shape))
    x = torch.randn(shape)
    for scale, shift in ((1, 0), (1e-3, 5), (300, -100), (1e-30, 0), (1e-40, 0), (1e-45, 0), (1e37, 0)):
        for group in (32, 96, 256):
            holds(Grouped(bits, group, stochastic), x * scale + shift)


@BITS
def test_the_bound_is_a_step_of_the_group(bits: int) -> None:
    """No more than the range of a group over its steps, and bfloat16's rounding: the codec may not bound too much."""
    torch.manual_seed(1)
    x = torch.randn(40, 256)
    step = (x.amax(1) - x.amin(1)) / (2**bits - 1)
    for stochastic, part in ((True, 1.0), (False, 0.5)):
        assert bool((Grouped(bits, 256, stochastic).bound(x) <= part * 1.01 * step[:, None]).all())


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_bound_holds_for_any_numbers(data: st.DataObject) -> None:
    numbers = st.floats(-(2.0**126), 2.0**126, width=32)
    values = data.draw(st.lists(st.one_of(numbers, st.floats(-1, 1, width=32)), min_size=1, max_size=70))
    bits, group = data.draw(st.sampled_from([8, 4, 2])), data.draw(st.sampled_from([32, 64, 256]))
    codec = Grouped(bits, group, data.draw(st.booleans()))
    x = torch.tensor(values)
    assert codec.refuse(x) is None
    holds(codec, x)
    holds(codec, x.repeat(8).view(8, -1))


@pytest.mark.parametrize(("bits", "bytes_"), [(8, 262), (4, 134), (2, 70)])
def test_sizes(bits: int, bytes_: int) -> None:
    codec = Grouped(bits)
    assert codec.size((1, 256)) == bytes_ and codec.size((10, 4, 8, 8)) == 10 * bytes_
    assert codec.size((0, 5)) == 0
    assert codec.size((1,)) == 6 + 8, "a group, and codes filled up to eight bytes"
    assert codec.size((257,)) == bytes_ + 6 + 8
    assert Grouped(2, 1024).size((4, 1024)) == 4 * (6 + 256)


@BITS
@pytest.mark.parametrize("value", [0.0, -0.0, 0.1, -3.3e37, 1e-45, 123456.78])
def test_constant_groups_come_back_exactly(bits: int, value: float) -> None:
    x = torch.full((3, 300), value)
    codec = Grouped(bits)
    assert torch.equal(there_and_back(codec, x), x)
    assert not codec.bound(x).any()


@BITS
def test_the_least_value_of_a_group_comes_back_exactly(bits: int) -> None:
    """So zeros behind a ReLU stay zeros, if other values may become zeros, too."""
    torch.manual_seed(0)
    x = torch.randn(8, 256).relu()
    back = there_and_back(Grouped(bits), x)
    assert not back[x == 0].any() and bool((back >= 0).all())


def _mean_error_in_steps(codec: Grouped, x: torch.Tensor, times: int) -> torch.Tensor:
    """Mean over seeds of (what comes back - x), in steps of the element's group."""
    back = torch.stack([there_and_back(codec, x) for _ in range(times)])
    _, step = codec._layout.scales_of(codec.encode(x), x.numel())
    return (back.double() - x.double()).mean(0).flatten() / step.double().repeat_interleave(codec.group)


@BITS
def test_the_mean_over_seeds_is_the_value(bits: int) -> None:
    """Every element's mean error within 5.5 standard errors (of the largest spread that rounding has: half a step)."""
    torch.manual_seed(3)
    x, times = torch.randn(2, 4, 8, 8) * torch.tensor([1.0, 50.0]).view(2, 1, 1, 1), 3000
    rounding = 2.0**-17 + 2.0**-19 * 2**bits * 4
    assert float(_mean_error_in_steps(Grouped(bits), x, times).abs().max()) < 5.5 * 0.5 / times**0.5 + rounding
    assert float(_mean_error_in_steps(Grouped(bits, stochastic=False), x, 2).abs().max()) > 0.4


def test_chance_is_even_and_elements_are_independent() -> None:
    """0.3 of a step: rounded up in 0.3 of the cases, whatever the other elements of the group do."""
    torch.manual_seed(4)
    x, codec, times = torch.full((256,), 0.3), Grouped(2), 4000
    x[0], x[1] = 0, 3
    up = torch.stack([there_and_back(codec, x)[2:] > 0.5 for _ in range(times)]).double()
    assert float(abs(up.mean() - 0.3)) < 5 * (0.21 / up.numel()) ** 0.5 + 2.0**-7
    centred = up - up.mean(0)
    correlations = (centred.T @ centred / times / 0.21).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 6 / times**0.5
    between_calls = (centred[1:] * centred[:-1]).mean() / 0.21
    assert float(between_calls.abs()) < 5 / centred.numel() ** 0.5


def test_the_seed_is_torchs() -> None:
    x, codec = torch.randn(3, 500), Grouped(4)
    torch.manual_seed(9)
    first, second = codec.encode(x), codec.encode(x)
    torch.manual_seed(9)
    assert torch.equal(codec.encode(x), first) and not torch.equal(first, second)
    torch.manual_seed(9)
    Grouped(4, stochastic=False).encode(x)
    codec.encode(x.to("meta"))
    assert torch.equal(codec.encode(x), first), "nothing is drawn for the nearer code, nor on meta tensors"


@BITS
def test_threads_and_fallback_give_the_same_bytes(bits: int) -> None:
    x = torch.randn(3, 100_001)
    threads = torch.get_num_threads()
    try:
        packed = []
        for count in (1, 2):
            torch.set_num_threads(count)
            packed.append(group_pack(x, bits, 256, 77))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(packed[0], packed[1])
    assert torch.equal(packed[0], fallback.group_pack(x, bits, 256, 77))


@BITS
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_never_becomes_a_number(bits: int, bad: float) -> None:
    for place in (0, 300, 511, 599):
        x = torch.zeros(1, 600)
        assert Grouped(bits).refuse(x) is None
        x[0, place] = bad
        assert Grouped(bits).refuse(x) == "has values that are not finite, which grouped cannot hold"
        lost = there_and_back(Grouped(bits), x).isnan()
        wanted = torch.arange(600) // 256 == place // 256
        assert torch.equal(lost[0], wanted), "its group is lost, and no other"


def test_what_is_too_large_is_refused_with_the_number() -> None:
    x = torch.tensor([[1.0, -(2.0**126)]])
    assert Grouped(2).refuse(x) is None and there_and_back(Grouped(2), x)[0, 1] == -(2.0**126)
    told = Grouped(2).refuse(x * 2)
    assert told == "has values as large as 1.7e+38, more than the 8.50706e+37 of grouped"
    assert there_and_back(Grouped(2), x * 2).isnan().all()


def test_bytes_of_another_number_are_refused() -> None:
    packed = Grouped(4).encode(torch.randn(2, 3, 5))
    for wrong in (packed[1:], packed[:0], packed.repeat(2)):
        with pytest.raises(EdgetuneError, match="are no 2x3x5 numbers by codec grouped"):
            Grouped(4).decode(wrong, (2, 3, 5))


@pytest.mark.parametrize(("bits", "group"), [(3, 256), (16, 256), (4, 0), (4, 100), (4, -32), (4, 2**17)])
def test_other_bits_and_groups_are_refused(bits: int, group: int) -> None:
    with pytest.raises(EdgetuneError, match=r"can't be packed: give 8|isn't whole blocks: give a multiple of 32"):
        Grouped(bits, group)


def test_other_layouts_and_types_are_taken() -> None:
    x = torch.randn(2, 3, 8, 8).to(torch.bfloat16)
    codec = Grouped(8, stochastic=False)
    wanted = codec.encode(x.float())
    for same in (x, x.double(), x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert torch.equal(codec.encode(same), wanted)


def test_a_part_of_a_longer_record_is_read() -> None:
    x, codec = torch.randn(1, 700), Grouped(2)
    packed = codec.encode(x)
    longer = torch.cat([torch.zeros(3, dtype=torch.uint8), packed])
    assert torch.equal(codec.decode(longer[3:], x.shape), codec.decode(packed, x.shape))
    assert torch.equal(fallback.group_unpack(longer[3:], 2, 256, 700), codec.decode(packed, (700,)))


def test_on_meta_sizes_are_the_real_ones() -> None:
    x = torch.empty(2, 3, 50, device="meta")
    packed = Grouped(2).encode(x)
    assert packed.is_meta and packed.numel() == Grouped(2).size((2, 3, 50))
    assert Grouped(2).decode(packed, x.shape).shape == x.shape
