"""More than 2^31 elements, without the memory: pages that nobody wrote to are one page of zeros."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from edgetune import kernels

ELEMENTS = 2**31


def _zeros(count: int, dtype: type) -> Tensor:
    if not kernels.status().native:
        pytest.skip("only the native code does its own index arithmetic")
    try:
        return torch.from_numpy(np.zeros(count, dtype=dtype))
    except MemoryError:
        pytest.skip("this system doesn't lend address space that isn't used")


def test_counts_beyond_32_bit_offsets() -> None:
    side = 46_400
    assert side * side > ELEMENTS
    bits = _zeros(side * side // 8, np.uint8)
    bits[-1] = 0b1110_0000  # three pixels of the last row
    counts = kernels.bits_count(bits, 1, 1, side, side, 32, 32)
    assert counts.dtype == torch.int32 and counts[0, 0, -1, -1] == 3 and counts.sum() == 3


@pytest.mark.parametrize("channels_last", [False, True])
def test_means_beyond_32_bit_offsets(channels_last: bool) -> None:
    c, side = (64, 5824) if channels_last else (2, 32_800)
    assert c * side * side > ELEMENTS
    flat = _zeros(c * side * side, np.int16).view(torch.bfloat16)
    flat[-1] = 2.0**20
    x = flat.view(1, side, side, c).permute(0, 3, 1, 2) if channels_last else flat.view(1, c, side, side)
    means = kernels.patch_mean(x, side // 8, side // 8)
    assert means.shape == (1, c, 8, 8) and (means != 0).sum() == 1
    torch.testing.assert_close(means[0, -1, -1, -1].double().item(), 2.0**20 / (side // 8) ** 2, rtol=4e-3, atol=0)
