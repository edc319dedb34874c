"""Slots of one size: the bound that is told holds, and zeros stay; damaged slots are detected."""

from __future__ import annotations

import math

import pytest
import torch

from coded import holds, there_and_back
from edgetune.codecs import Slotted
from edgetune.errors import EdgetuneError

SHAPES = [(1,), (7,), (3, 5), (5, 3, 7), (16, 16, 16), (64, 14, 14)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["dense", "rectified", "sparse", "zero", "constant", "spread"])
def test_the_bound_holds_in_one_size(shape: tuple[int, ...], kind: str) -> None:
    x = torch.randn(1, *shape)
    x = {"dense": x, "rectified": x.relu(), "sparse": x * (x > 2), "zero": 0 * x, "constant": torch.full_like(x, 3.0),
         "spread": x * torch.logspace(-20, 20, x.numel()).view(x.shape)}[kind]  # fmt: skip
    codec = Slotted()
    holds(codec, x)
    packed, back = codec.encode(x), there_and_back(codec, x)
    assert packed.numel() == codec.size(x.shape)
    assert torch.equal(back == 0, x == 0)


def test_what_is_compressible_comes_back_nearer() -> None:
    x = torch.randn(1, 64, 14, 14)
    sparse = x * (x > 1)
    dense, half, few = (float(Slotted().bound(each).max()) for each in (x, x.relu(), sparse))
    assert few < half < dense < 0.3
    assert Slotted(8.0).bound(x).max() < dense


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    x = torch.randn(1, 3, 8, 8)
    assert Slotted().refuse(x) is None
    x[0, 1, 2, 3] = bad
    assert "not finite" in str(Slotted().refuse(x))


def test_damaged_slots_are_detected() -> None:
    codec, x = Slotted(), torch.randn(1, 8, 16, 16)
    packed = codec.encode(x)
    for at in (0, 8, 24, 40, packed.numel() // 3):
        wrong = packed.clone()
        wrong[at] ^= 0x55
        with pytest.raises(EdgetuneError):
            codec.decode(wrong, x.shape)
    with pytest.raises(EdgetuneError):
        codec.decode(packed[:-1], x.shape)
