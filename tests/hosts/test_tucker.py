"""Tucker factors and the weight gradient from them, against float64 decompositions and autograd on whole inputs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgetune.hosts import tucker_gradient
from edgetune.hosts.conv import convolve
from edgetune.hosts.tucker import (
    AXES,
    Ranks,
    Tucker,
    allowed,
    by_cost,
    folded,
    iterated,
    product,
    start,
    truncated_hosvd,
    tucker_size,
    unfolded,
)
from edgetune.hosts.tucker_gradient import factored_weight_gradient
from edgetune.overlap import ConvGeometry
from geometries import geometries, operands


def rebuilt(factors: Tucker) -> torch.Tensor:
    """The whole map, by one sum over everything."""
    bases = [factors.bases.get(name, torch.eye(size, dtype=factors.core.dtype))
             for name, size in zip(AXES, factors.core.shape, strict=True)]
    return torch.einsum("abde,na,cb,hd,we->nchw", factors.core, *bases)


def random_factors(shape: tuple[int, ...], ranks: Ranks, seed: int = 0) -> Tucker:
    """Any factors of those ranks (not even orthonormal); axes of full rank have no basis."""
    generator = torch.Generator().manual_seed(seed)
    bases = {name: torch.randn(size, rank, generator=generator, dtype=torch.float64)
             for name, size, rank in zip(AXES, shape, ranks, strict=True) if rank < size}
    return Tucker(torch.randn(ranks, generator=generator, dtype=torch.float64), bases)


def by_autograd(x: torch.Tensor, gy: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
    weight = torch.zeros(shape, dtype=x.dtype, requires_grad=True)
    return torch.autograd.grad(convolve(x, weight, None, geometry), weight, gy)[0]


@pytest.mark.parametrize("order", ["by cost", "core", "groups"])
@settings(max_examples=60)
@given(geometries(), st.integers(1, 4), st.tuples(*[st.integers(1, 5)] * 4))
def test_weight_gradient_is_that_of_the_whole_map(order: str, geometry: ConvGeometry, batch: int,
                                                  ranks: Ranks) -> None:
    """Every stride, dilation, group count and asymmetric padding, in both orders of the channels."""
    shape = (batch, geometry.in_channels, *geometry.in_hw)
    factors = random_factors(shape, allowed(shape, ranks))
    _, _, gy = operands(geometry, batch)
    with pytest.MonkeyPatch.context() as patch:
        if order != "by cost":
            patch.setattr(tucker_gradient, "in_core_channels", lambda *_: order == "core")
        found = factored_weight_gradient(factors, gy, geometry)
    expected = by_autograd(rebuilt(factors), gy, geometry)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-9 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_weight_gradient_of_wide_layers(groups: int) -> None:
    """More channels than the random geometries have: every piece of every group comes to its place."""
    geometry = ConvGeometry(in_channels=16, out_channels=24, groups=groups, in_hw=(7, 6), kernel=(3, 2), stride=(2, 1),
                            dilation=(1, 2), pads=(1, 0, 2, 1))
    for ranks in ((5, 3, 2, 2), (5, 16, 7, 6), (2, 1, 7, 2), (1, 15, 3, 6)):
        factors = random_factors((5, 16, 7, 6), ranks)
        _, _, gy = operands(geometry, 5)
        expected = by_autograd(rebuilt(factors), gy, geometry)
        assert torch.allclose(factored_weight_gradient(factors, gy, geometry), expected, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1), (3, 2)])
def test_weight_gradient_of_pointwise_layers(stride: tuple[int, int], layout: torch.memory_format) -> None:
    """gy is carried to the bases, whichever axes have one; with a stride some rows of the bases are not read."""
    geometry = ConvGeometry(in_channels=12, out_channels=10, groups=1, in_hw=(7, 5), kernel=(1, 1), stride=stride,
                            dilation=(1, 1), pads=(0, 0, 0, 0))
    for ranks in ((3, 4, 2, 2), (5, 4, 7, 1), (3, 12, 2, 5), (5, 12, 7, 5), (1, 1, 1, 1)):
        factors = random_factors((5, 12, 7, 5), ranks)
        gy = operands(geometry, 5)[2].contiguous(memory_format=layout)
        expected = by_autograd(rebuilt(factors), gy, geometry)
        assert torch.allclose(factored_weight_gradient(factors, gy, geometry), expected, atol=1e-9)


def test_depthwise_layers_grow_their_channels_and_others_do_not() -> None:
    wide = ConvGeometry(in_channels=64, out_channels=64, groups=64, in_hw=(7, 7), kernel=(3, 3), stride=(1, 1),
                        dilation=(1, 1), pads=(1, 1, 1, 1))
    assert not tucker_gradient.in_core_channels(wide, 4, 8)
    assert tucker_gradient.in_core_channels(wide.model_copy(update={"groups": 1}), 4, 8)


@settings(max_examples=60)
@given(st.tuples(*[st.integers(1, 6)] * 4), st.floats(0.3, 1.0), st.integers(0, 9))
def test_hosvd_loses_no_more_than_it_may(shape: tuple[int, ...], energy: float, seed: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = truncated_hosvd(x, energy)
    lost = float((x - rebuilt(found)).square().sum() / x.square().sum())
    assert lost <= 4 * (1 - energy) + 1e-12
    # what is lost is what the core does not hold: bases are orthonormal, losses add up
    assert math.isclose(float(found.core.square().sum() / x.square().sum()), 1 - lost, abs_tol=1e-9)
    for name, basis in found.bases.items():
        assert basis.shape[0] == x.shape[AXES.index(name)] > basis.shape[1]
        assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[1], dtype=x.dtype), atol=1e-9)


@settings(max_examples=30)
@given(st.tuples(*[st.integers(2, 6)] * 4), st.floats(0.3, 0.99), st.integers(0, 9))
def test_every_rank_is_the_smallest_by_its_own_svd(shape: tuple[int, ...], energy: float, seed: int) -> None:
    """Axis by axis: the subspace is the SVD's of what is left, and one column less would lose too much."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found, left = truncated_hosvd(x, energy), x
    for name in ("n", "h", "w", "c"):
        axis = AXES.index(name)
        vectors, values, _ = torch.linalg.svd(unfolded(left, axis), full_matrices=False)
        rank = found.core.shape[axis]
        may_lose = (1 - energy) * x.square().sum()
        assert values[rank:].square().sum() <= may_lose + 1e-12
        assert rank == 1 or values[rank - 1:].square().sum() > may_lose - 1e-12
        if name in found.bases:
            basis = found.bases[name]
            assert torch.allclose(basis @ basis.mT, vectors[:, :rank] @ vectors[:, :rank].mT, atol=1e-6)
            left = product(left, basis.mT, axis)


def test_hosvd_of_a_map_that_is_of_low_rank_finds_its_ranks() -> None:
    truth = random_factors((6, 20, 7, 5), (2, 3, 2, 1))
    found = truncated_hosvd(rebuilt(truth), 1 - 1e-10)
    assert found.core.shape == (2, 3, 2, 1)
    assert torch.allclose(rebuilt(found), rebuilt(truth), atol=1e-4)
    assert found.numel == tucker_size((6, 20, 7, 5), (2, 3, 2, 1))


def test_all_energy_is_the_map_itself() -> None:
    x = torch.randn(3, 5, 4, 4)
    found = truncated_hosvd(x, 1.0)
    assert not found.bases and torch.equal(found.core, x)


def test_a_map_of_zeros_has_rank_one() -> None:
    found = truncated_hosvd(torch.zeros(3, 5, 4, 2), 0.9)
    assert found.core.shape == (1, 1, 1, 1) and not rebuilt(found).any()


def test_ranks_limit_what_the_energy_asks_for() -> None:
    x = torch.randn(6, 9, 5, 5, dtype=torch.float64)
    free, limited = truncated_hosvd(x, 0.95), truncated_hosvd(x, 0.95, (3, 9, 2, 5))
    assert limited.core.shape[0] == 3 and limited.core.shape[2] == 2
    assert limited.core.shape[1] <= free.core.shape[1] and limited.core.shape[3] <= free.core.shape[3]
    assert truncated_hosvd(x, 1.0, (6, 4, 5, 5)).bases.keys() == {"c"}


@settings(max_examples=60)
@given(st.tuples(*[st.integers(1, 9)] * 4), st.tuples(*[st.integers(1, 12)] * 4))
def test_allowed_ranks_are_those_an_unfolding_can_have(shape: tuple[int, ...], ranks: Ranks) -> None:
    found = allowed(shape, ranks)
    assert all(1 <= k <= min(r, s) for k, r, s in zip(found, ranks, shape, strict=True))
    assert all(k <= math.prod(found[:m] + found[m + 1:]) for m, k in enumerate(found))
    assert allowed(shape, found) == found


@settings(max_examples=30)
@given(st.tuples(*[st.integers(1, 5)] * 4), st.tuples(*[st.integers(1, 5)] * 4), st.integers(0, 9))
def test_a_rank_beyond_the_others_product_holds_nothing(shape: tuple[int, ...], ranks: Ranks, seed: int) -> None:
    """Any factors of the wanted ranks are the same map in allowed ones."""
    wanted = tuple(min(rank, size) for rank, size in zip(ranks, shape, strict=True))
    whole = rebuilt(random_factors(shape, wanted, seed))
    found = truncated_hosvd(whole, 1 - 1e-12)
    assert all(have <= may for have, may in zip(found.core.shape, allowed(shape, ranks), strict=True))


@settings(max_examples=100)
@given(st.tuples(*[st.integers(1, 9)] * 4), st.tuples(*[st.integers(1, 9)] * 4))
def test_no_order_of_the_axes_takes_fewer_products(shape: tuple[int, ...], wanted: Ranks) -> None:
    ranks = allowed(shape, wanted)

    def products(order: Sequence[int]) -> int:
        sizes, total = list(shape), 0
        for axis in order:
            total += ranks[axis] * math.prod(sizes)
            sizes[axis] = ranks[axis]
        return total

    order = by_cost(shape, ranks)
    assert sorted(order) == [axis for axis in range(4) if ranks[axis] < shape[axis]]
    assert products(order) == min(products(each) for each in itertools.permutations(order))


def test_iterations_come_to_the_leading_singular_vectors() -> None:
    x = rebuilt(random_factors((8, 12, 6, 6), (8, 3, 6, 6))) + 0.01 * torch.randn(8, 12, 6, 6, dtype=torch.float64)
    leading = torch.linalg.svd(unfolded(x, 1), full_matrices=False).U[:, :3]
    basis = start(12, 3, 0).to(x)
    for _ in range(8):
        basis = iterated(unfolded(x, 1), basis)
    assert torch.allclose(basis @ basis.mT, leading @ leading.mT, atol=1e-6)


def test_an_iteration_keeps_what_the_map_does_not_reach() -> None:
    basis = start(12, 4, 3)
    still = iterated(torch.zeros(12, 18), basis)
    assert torch.allclose(still @ still.mT, basis @ basis.mT, atol=1e-5)
    one = torch.zeros(12, 18)
    one[5] = 1.0
    found = iterated(one, basis)
    assert torch.allclose(found.mT @ found, torch.eye(4), atol=1e-5)
    assert float(found[5].square().sum()) > 1 - 1e-6  # the direction that is there is found
    assert float((found.mT @ basis).square().sum()) > 3 - 1e-3  # and three of the old ones are left


def test_the_start_is_orthonormal_and_leaves_global_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    basis = start(10, 4, 7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(basis.mT @ basis, torch.eye(4), atol=1e-6)
    assert torch.equal(basis, start(10, 4, 7)) and not torch.equal(basis, start(10, 4, 8))


def test_products_and_unfoldings_are_einsums() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    for axis, letter in enumerate("nchw"):
        matrix = torch.randn(6, x.shape[axis], dtype=torch.float64)
        expected = torch.einsum(f"r{letter},nchw->{'nchw'.replace(letter, 'r')}", matrix, x)
        assert torch.allclose(product(x, matrix, axis), expected)
        assert torch.allclose(product(x.to(memory_format=torch.channels_last), matrix, axis), expected)
        assert torch.equal(unfolded(x, axis), torch.stack([part.reshape(-1) for part in x.unbind(axis)]))
        others = [at for at in range(4) if at != axis]
        for order in itertools.permutations(range(4)):
            lying = x.permute(order).contiguous().permute([order.index(at) for at in range(4)])
            sheet = unfolded(lying, axis)
            assert torch.equal(folded(sheet, lying, axis), x)
            assert torch.allclose(product(lying, matrix, axis), expected)
            assert torch.allclose(sheet.mm(sheet.mT), torch.tensordot(x, x, (others, others)))
            if axis in (order[0], order[3]):
                assert sheet.data_ptr() == lying.data_ptr()
        last = x.to(memory_format=torch.channels_last)
        assert torch.equal(unfolded(last, axis), torch.stack([part.permute(
            [("nchw".replace(letter, "")).index(each) for each in "nhwc" if each != letter]).reshape(-1)
            for part in x.unbind(axis)]))
