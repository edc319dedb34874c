"""The error-bounded codec: the bound on every element, zeros, a cap on bits, and bytes that are none."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune import kernels
from edgetune.codecs import Bounded, used_bound
from edgetune.errors import EdgetuneError
from edgetune.kernels import fallback

NAN, INF = float("nan"), float("inf")
BOUNDS = [0.0, 1e-44, 1e-6, 1e-5, 1e-3, 0.01, 0.3, 4.0, 1e30]


def made(name: str, count: int = 20_000) -> torch.Tensor:
    x = torch.randn(count)
    return {
        "relu": x.relu(),
        "normal": x,
        "above": x + 7,
        "smooth": x.cumsum(0) / 20,
        "runs": torch.where(torch.randn(count).cumsum(0) > 0, x.abs(), 0),
        "sparse": torch.where(x > 2, x, 0),
        "zero": torch.zeros(count),
        "constant": torch.full((count,), 2.5),
        "whole": x.round(),
        "tiny": x * 1e-40,
        "huge": x * 1e35,
        "uneven": x * torch.randn(count).mul(6).exp(),
        "one": x[:1],
        "empty": x[:0],
        "part": x[:8193],
    }[name]


CASES = ["relu", "normal", "above", "smooth", "runs", "sparse", "zero", "constant", "whole", "tiny", "huge", "uneven",
         "one", "empty", "part"]  # fmt: skip


def holds(codec: Bounded, x: torch.Tensor) -> torch.Tensor:
    """The bytes of x, once they have come back within the bound, in float64, and with the same zeros."""
    packed = codec.encode(x)
    assert (packed.dtype, packed.dim()) == (torch.uint8, 1) and packed.numel() <= codec.size(x.shape)
    back = codec.decode(packed, x.shape)
    assert (back.dtype, back.shape) == (torch.float32, x.shape)
    error, bound = (back.double() - x.double()).abs(), codec.bound(x).double()
    assert bound.shape == x.shape and bool((error <= bound).all()), float((error - bound).max())
    assert torch.equal(back == 0, x == 0)
    assert bool(((back.sign() == x.sign()) | (x.abs().double() <= bound * 2.0**-120)).all())
    return packed


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_the_bound_holds_on_every_element(name: str, bound: float) -> None:
    x, codec = made(name), Bounded(bound)
    packed = holds(codec, x)
    assert used_bound(packed) == bound
    sizes = fallback.bounded_sizes(x, bound)
    assert torch.equal(packed, fallback.bounded_encode(x, sizes, bound, packed.numel()))
    back = fallback.bounded_decode(packed, x.numel())
    assert torch.equal(back.view(torch.int32), codec.decode(packed, x.shape).view(torch.int32))


@pytest.mark.parametrize("name", CASES)
def test_bound_0_gives_back_every_bit(name: str) -> None:
    x = made(name)
    x[::7] = -0.0
    x[1::1000], x[2::1000], x[3::1000] = NAN, INF, -INF
    codec = Bounded(0)
    assert torch.equal(codec.decode(codec.encode(x), x.shape).view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("bound", [1e-3, 0.3])
def test_what_is_not_finite_is_kept_with_its_block(bound: float) -> None:
    x, codec = torch.randn(3000), Bounded(bound)
    x[[5, 400, 2999]], x[6] = torch.tensor([NAN, -INF, INF]), -0.0
    back = codec.decode(codec.encode(x), x.shape)
    for block in (slice(0, 256), slice(256, 512), slice(2816, 3000)):
        assert torch.equal(back[block].view(torch.int32), x[block].view(torch.int32))
    rest = slice(512, 2816)
    assert 0 < float((back - x)[rest].abs().max()) <= bound
    assert codec.bound(x)[[5, 6, 400, 2999]].tolist() == [0, 0, 0, 0]


def test_over_a_million_values_and_any_number_of_threads() -> None:
    x, codec, before = torch.randn(1, 3, 800, 600).relu(), Bounded(0.01), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = holds(codec, x)
        torch.set_num_threads(2)
        assert torch.equal(holds(codec, x), alone)
    finally:
        torch.set_num_threads(before)
    assert 4 * x.numel() / alone.numel() > 7  # 7.36 at best, by the entropy of a bit and half a normal value


def test_memory_order_is_the_logical_one() -> None:
    x, codec = torch.randn(2, 5, 6, 7).relu(), Bounded(0.01)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(codec.encode(x), codec.encode(last))
    assert torch.equal(codec.encode(x.bfloat16()), codec.encode(x.bfloat16().float()))


def test_on_meta_the_size_is_the_most() -> None:
    x = torch.empty(2, 3, 50, 50, device="meta")
    packed = Bounded(0.1, 4.0).encode(x)
    assert packed.is_meta and packed.shape == (32 + 2 * 8 + 7500 + 16,)
    assert Bounded(0.1).encode(x).shape == (32 + 2 * 8 + 4 * 15_000 + 59,)
    assert Bounded(0.1).decode(packed, x.shape).shape == x.shape


@pytest.mark.parametrize("most_bits", [3.0, 4.5, 8.0, 40.0])
@pytest.mark.parametrize("name", CASES)
def test_the_bound_grows_until_a_cap_is_held(name: str, most_bits: float) -> None:
    x, codec = made(name), Bounded(1e-6, most_bits)
    packed = holds(codec, x)
    used = used_bound(packed)
    times = math.log2(used / 1e-6)
    assert times >= 0 and math.isclose(times, round(times), abs_tol=1e-9)
    assert packed.numel() <= codec.size(x.shape) <= 32 + 8 * 3 + math.ceil(x.numel() * most_bits / 8) + 16
    if times > 0.5:
        assert Bounded(used / 2).encode(x).numel() > codec.size(x.shape)


def test_what_cannot_fit_is_refused() -> None:
    x, codec = torch.full((2000,), NAN), Bounded(1e-3, 4.0)
    assert codec.refuse(torch.ones(3)) is None and Bounded(1e-3).refuse(x) is None
    assert "not finite" in str(codec.refuse(x))
    with pytest.raises(EdgetuneError, match=r"do not fit 4\.0 bits"):
        codec.encode(x)


REFUSED = [(-1.0, None), (NAN, None), (INF, None), (0.1, 2.0), (0.1, NAN), (0.0, 8.0)]


@pytest.mark.parametrize(("bound", "most_bits"), REFUSED)
def test_bounds_that_bound_nothing_are_refused(bound: float, most_bits: float | None) -> None:
    with pytest.raises(EdgetuneError, match=r"codec bounded cannot .*: give"):
        Bounded(bound, most_bits)


@settings(max_examples=150)
@given(
    st.lists(st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 1.5]), max_size=700),
    st.sampled_from(BOUNDS) | st.floats(0, 1e6),
)
def test_any_values_come_back(values: list[float], bound: float) -> None:
    x = torch.from_numpy(np.array(values, dtype=np.float32))
    codec = Bounded(bound)
    packed = codec.encode(x)
    back = codec.decode(packed, x.shape)
    near = (back.double() - x.double()).abs() <= bound
    assert bool((near | (back == x) | (back.isnan() & x.isnan())).all())
    assert torch.equal(back == 0, x == 0)
    assert torch.equal(packed, fallback.bounded_encode(x, kernels.bounded_sizes(x, bound), bound, packed.numel()))


def _refused(packed: torch.Tensor, count: int) -> None:
    for decode in (kernels.bounded_decode, fallback.bounded_decode):
        with pytest.raises(EdgetuneError, match=r"these bytes are no tensor by the error-bounded codec .*: read"):
            decode(packed, count)


def test_every_flipped_byte_is_seen() -> None:
    x = torch.cat([torch.randn(300).relu(), torch.randn(257), torch.zeros(256), torch.tensor([NAN])])
    packed = Bounded(0.05).encode(x)
    for i in range(packed.numel()):
        for change in (1, 128, 255):
            broken = packed.clone()
            broken[i] ^= change
            with pytest.raises(EdgetuneError, match="these bytes"):
                kernels.bounded_decode(broken, x.numel())
        if i % 40 < 2:
            _refused(broken, x.numel())


def test_cut_and_strange_bytes_are_refused() -> None:
    x = torch.randn(9000).relu()
    packed = Bounded(0.05).encode(x)
    for end in (0, 1, 31, 32, 40, 47, 48, 1000, packed.numel() - 1):
        _refused(packed[:end], x.numel())
    _refused(torch.cat([packed, packed[:1]]), x.numel())
    _refused(packed, x.numel() - 1)
    _refused(packed, 10**12)
    _refused(packed.flip(0), x.numel())
    for size in (0, 40, 5000):
        _refused(torch.randint(0, 256, (size,), dtype=torch.uint8), x.numel())


def test_chunks_that_change_places_are_seen() -> None:
    x = torch.randn(8192).round()
    packed = Bounded(0.05).encode(torch.cat([x, x]))
    size, first = (packed.numel() - 48) // 2, 48
    other = Bounded(0.05).encode(torch.cat([x, x.flip(0)]))
    assert int(packed[36]) != int(packed[44])  # the check knows the place
    swapped = torch.cat([packed[:40], packed[32:40], packed[48:]])
    _refused(swapped, 2 * x.numel())
    assert not torch.equal(packed[first : first + size], other[-size:])


def test_sizes_of_other_values_are_refused() -> None:
    x, y = torch.randn(9000), torch.randn(9000).relu()
    sizes = kernels.bounded_sizes(x, 0.1)
    wrong = [kernels.bounded_sizes(y, 0.1), sizes + torch.tensor([1, -1], dtype=torch.int32), -sizes, sizes * 0]
    for other in wrong:
        with pytest.raises(EdgetuneError, match="sizes"):
            kernels.bounded_encode(x, other, 0.1)
    with pytest.raises(EdgetuneError, match="don't belong"):
        kernels.bounded_encode(x[:100], sizes, 0.1)
    with pytest.raises(EdgetuneError, match="bounds nothing"):
        kernels.bounded_sizes(x, -1.0)
