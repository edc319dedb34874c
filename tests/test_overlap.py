"""The overlap table against counting by hand, and the factors made of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgetune.hosts.grid import transfer
from edgetune.overlap import ConvGeometry, cell_sizes, cells, mean_factors, overlap, same_pads
from geometries import geometries


def layer(**changes: object) -> ConvGeometry:
    plain = {"in_channels": 1, "out_channels": 1, "groups": 1, "in_hw": (6, 6), "kernel": (3, 3), "stride": (1, 1),
             "dilation": (1, 1), "pads": (1, 1, 1, 1)}
    return ConvGeometry(**{**plain, **changes})


@given(geometries(), st.integers(1, 5), st.integers(1, 5), st.integers(0, 1))
def test_table_counts_output_pixels_whose_tap_lands_in_the_cell(
        geometry: ConvGeometry, cell_out: int, cell_in: int, axis: int) -> None:
    table = overlap(geometry, axis, cell_out, cell_in)
    counted = torch.zeros_like(table)
    for j in range(geometry.out_hw[axis]):
        for u in range(geometry.kernel[axis]):
            landing = geometry.stride[axis] * j + geometry.dilation[axis] * u - geometry.pads[2 * axis]
            if 0 <= landing < geometry.in_hw[axis]:
                counted[u, j // cell_out, landing // cell_in] += 1
    assert torch.equal(table, counted)


def test_factors_of_the_top_cell_of_a_same_padded_three_tap_kernel() -> None:
    """k3 p1 r2, top cell: 2, 2, 1 taps land for gx, 1, 2, 2 for gw; the two factors differ elsewhere."""
    table = overlap(layer(), 0, 2, 2)
    assert table.sum(1)[:, 0].tolist() == [2, 2, 1]
    assert table.sum(2)[:, 0].tolist() == [1, 2, 2]


def test_factors_carry_the_stride() -> None:
    m, n = mean_factors(layer(in_hw=(32, 32), stride=(2, 2)), 0, 2, 4)
    assert torch.allclose(m[1:-1], torch.full((6,), 0.5, dtype=torch.float64))
    assert torch.allclose(n[1:-1], torch.full((6,), 2.0, dtype=torch.float64))


@given(st.integers(1, 40), st.integers(1, 9))
def test_cells_cover_the_axis(size: int, cell: int) -> None:
    sizes = cell_sizes(size, cell)
    assert len(sizes) == cells(size, cell) and sizes.sum() == size and sizes.max() <= cell


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))
def test_transfer_is_the_mean_of_the_spread(size: int, source: int, target: int) -> None:
    values = torch.randn(cells(size, source), dtype=torch.float64)
    pixels = values[torch.arange(size) // source]
    expected = torch.stack([part.mean() for part in pixels.split(target)])
    assert torch.allclose(transfer(size, source, target) @ values, expected)


@pytest.mark.parametrize(("size", "kernel", "stride", "expected"),
                         [(224, 3, 2, (0, 1)), (7, 3, 1, (1, 1)), (5, 2, 1, (0, 1)), (8, 1, 2, (0, 0))])
def test_same_pads_put_the_odd_pixel_last(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    assert same_pads((size, size), (kernel, kernel), (stride, stride), (1, 1))[:2] == expected


def test_another_map_size_keeps_explicit_pads_and_recomputes_same_pads() -> None:
    assert layer().at(9, 4).out_hw == (9, 4)
    moved = layer(stride=(2, 2), same=True, in_hw=(8, 8), pads=(0, 1, 0, 1)).at(7, 8)
    assert moved.pads == (1, 1, 0, 1) and moved.out_hw == (4, 4)
