"""Scratch memory of CPU convolutions, against the allocator's events."""

from __future__ import annotations

import pytest
import torch

from edgetune.allocator import peak_during
from edgetune.scratch import scratch_bytes

CPU = torch.device("cpu")
aten = torch.ops.aten

# samples, channels in and out, pixels, kernel, stride, groups
CASES = [(8, 3, 32, 64, 3, 2, 1), (8, 64, 96, 28, 3, 1, 1), (8, 64, 96, 28, 3, 2, 1), (8, 64, 64, 28, 3, 1, 64),
         (16, 64, 96, 28, 1, 1, 1), (1, 64, 96, 28, 3, 1, 1), (1, 64, 96, 14, 5, 1, 1)]


MASKS = [None, (False, True), (True, False), (True, True)]


# no one asks for the gradient of the pictures: the first layer has its forward and its weights only
@pytest.mark.parametrize(("case", "mask"), [(case, mask) for case in CASES for mask in MASKS
                                            if case[1] > 3 or mask in MASKS[:2]], ids=str)
def test_scratch_is_what_the_allocator_sees(case: tuple[int, ...], mask: tuple[bool, bool] | None) -> None:
    n, c, o, px, kernel, stride, groups = case
    x, weight = torch.randn(n, c, px, px), torch.randn(o, c // groups, kernel, kernel)
    rest = ((stride,) * 2, (kernel // 2,) * 2, (1, 1), False, (0, 0), groups)
    if mask is None:
        func, args = aten.convolution.default, (x, weight, None, *rest)
    else:
        gy = torch.randn(n, o, (px - 1) // stride + 1, (px - 1) // stride + 1)
        func, args = aten.convolution_backward.default, (gy, x, weight, None, *rest, (*mask, False))
    func(*args)  # what the library sets up once is not scratch
    seen = peak_during(CPU, lambda: func(*args))
    # per-thread sums of partial weight gradients come on top, and depend on the machine
    assert scratch_bytes(func, args) == pytest.approx(seen, rel=0.1)


def test_nothing_is_computed_or_allocated() -> None:
    x, weight = torch.empty(1, device="meta").expand(64, 512, 512, 512), torch.empty(512, 512, 3, 3, device="meta")
    rest = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    assert peak_during(CPU, lambda: scratch_bytes(aten.convolution.default, (x, weight, None, *rest))) < 1024


def test_other_operators_have_none() -> None:
    assert scratch_bytes(aten.relu.default, (torch.zeros(3),)) == 0
