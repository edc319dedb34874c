"""Codecs give back what they were given, within the bound that they state for every element."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coded import holds, there_and_back
from edgetune.codecs import PLAIN
from edgetune.codecs.plain import Plain
from edgetune.errors import EdgetuneError

SHAPES = [(), (1,), (7,), (3, 1, 1), (3, 5), (2, 4, 4), (5, 3, 7), (1, 16, 1), (2, 15), (3, 2, 3, 4)]
EVERY = pytest.mark.parametrize("codec", PLAIN.values(), ids=PLAIN.keys())
LOSSY = pytest.mark.parametrize("codec", [c for c in PLAIN.values() if not c.exact], ids=lambda codec: codec.name)


@EVERY
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_the_bound_holds_on_every_shape(codec: Plain, shape: tuple[int, ...], batch: int) -> None:
    generator = torch.Generator().manual_seed(len(shape) + batch)
    x = torch.randn((batch, *shape), generator=generator)
    for scale, shift in ((1, 0), (1e-3, 5), (300, -100), (1e-30, 0)):
        holds(codec, x * scale + shift)


@EVERY
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_bound_holds_for_any_numbers(codec: Plain, data: st.DataObject) -> None:
    largest = float(np.float32(min(codec.largest, 3e38)))
    numbers = st.floats(-largest, largest, width=32, allow_nan=False)
    values = data.draw(st.lists(st.one_of(numbers, st.floats(-1, 1, width=32)), min_size=1, max_size=40))
    x = torch.tensor(values)
    holds(codec, x[None])
    holds(codec, x[:, None])
    holds(codec, torch.cat([x, x.flip(0)]).repeat(16).reshape(1, 2, -1))


def test_float32_keeps_every_bit() -> None:
    bits = torch.tensor([0, -(2**31), 1, 2139095040, -8388608, 2143289344, 2139095041, 2139095039], dtype=torch.int32)
    x = bits.view(torch.float32)[None]
    codec = PLAIN["float32"]
    assert codec.refuse(x) is None
    assert torch.equal(there_and_back(codec, x).view(torch.int32), x.view(torch.int32))


@LOSSY
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(codec: Plain, bad: float) -> None:
    x = torch.zeros(2, 3, 4)
    assert codec.refuse(x) is None
    x[1, 2, 0] = bad
    assert codec.refuse(x) == f"has values that are not finite, which {codec.name} cannot hold"


def test_what_is_too_large_is_refused_with_the_number() -> None:
    assert PLAIN["float16"].refuse(torch.tensor([[65504.0]])) is None
    told = PLAIN["float16"].refuse(torch.tensor([[1.0, -70000.0]]))
    assert told == "has values as large as 7e+04, more than the 65504 of float16"


def test_int8_takes_a_quarter_and_scales_each_channel_alone() -> None:
    codec = PLAIN["int8"]
    assert codec.size((2, 160, 7, 7)) == 2 * 160 * (49 + 8)
    assert codec.size((1, 1280)) == 1280 + 8
    x = torch.rand(2, 3, 8, 8) * torch.tensor([1e-3, 1, 1e3])[:, None, None]
    error = (there_and_back(codec, x) - x).abs().amax((0, 2, 3))
    assert bool((error < torch.tensor([1e-3, 1, 1e3]) / 500).all())


@EVERY
def test_a_part_of_a_longer_record_is_read(codec: Plain) -> None:
    x = torch.randn(1, 3, 5)
    packed = codec.encode(x)
    longer = torch.cat([torch.zeros(3, dtype=torch.uint8), packed])
    assert torch.equal(codec.decode(longer[3:], (1, 3, 5)), codec.decode(packed, (1, 3, 5)))


@EVERY
def test_bytes_of_another_number_are_refused(codec: Plain) -> None:
    packed = codec.encode(torch.randn(2, 3, 5))
    for wrong in (packed[1:], packed[:0], packed.repeat(2)):
        with pytest.raises(EdgetuneError, match=f"are no 2x3x5 numbers by codec {codec.name}"):
            codec.decode(wrong, (2, 3, 5))


@EVERY
def test_on_meta_sizes_are_the_real_ones(codec: Plain) -> None:
    x = torch.empty(2, 3, 5, device="meta")
    packed = codec.encode(x)
    assert packed.is_meta and packed.numel() == codec.size((2, 3, 5))
    assert codec.decode(packed, x.shape).shape == x.shape
