"""HOSVD: what is kept holds the energy asked for, in no more than the bound; the gradient is that of what is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgetune as et
from edgetune.hosts.conv import weight_gradient
from edgetune.hosts.tucker import AXES, Tucker, tucker_size
from edgetune.methods.backward.hosvd import HOSVD, ranks_within
from edgetune.overlap import ConvGeometry
from edgetune.plan import last_layers
from geometries import geometries, operands
from nets import NETS, scramble


def kept_by(method: HOSVD, x: torch.Tensor, geometry: ConvGeometry) -> Tucker:
    kept = method.keep(x, geometry, {})
    assert isinstance(kept, dict)
    return Tucker.of(kept)


def smooth(n: int, c: int, h: int, w: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Maps that a few patterns make up, with a little noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.nn.functional.interpolate(torch.randn(4, 1, 3, 3, generator=generator), (h, w), mode="bilinear")
    channels, samples = torch.randn(c, 4, generator=generator), torch.randn(64, 4, generator=generator)[:n]
    x = torch.einsum("nk,ck,khw->nchw", samples * torch.tensor([4.0, 2.0, 1.0, 0.2]), channels, patterns[:, 0])
    x = x + 0.05 * torch.randn(n, c, h, w, generator=generator)
    return x.to(dtype)


@settings(max_examples=60)
@given(geometries(), st.integers(1, 4))
def test_all_the_energy_is_the_exact_gradient(geometry: ConvGeometry, batch: int) -> None:
    x, w, gy = operands(geometry, batch)
    method = HOSVD(energy=1.0, most=1.0)
    found = method.grad_weight(method.keep(x, geometry, {}), method.receive(gy, geometry), geometry)
    assert torch.allclose(found, weight_gradient(x, gy, geometry), atol=1e-9)
    assert torch.allclose(method.grad_input(gy, w, geometry), torch.autograd.grad(
        et.hosts.conv.convolve(probe := torch.zeros_like(x, requires_grad=True), w, None, geometry), probe, gy)[0])


@settings(max_examples=60)
@given(geometries(), st.integers(1, 6), st.floats(0.2, 0.99), st.floats(0.1, 1.0))
def test_the_gradient_is_that_of_what_is_kept_and_kept_is_within_the_bound(
        geometry: ConvGeometry, batch: int, energy: float, most: float) -> None:
    x, _, gy = operands(geometry, batch)
    method = HOSVD(energy=energy, most=most)
    factors = kept_by(method, x, geometry)
    found = method.grad_weight(factors.kept(), gy, geometry)
    assert torch.allclose(found, weight_gradient(factors.grown(*AXES), gy, geometry), atol=1e-9)
    assert factors.numel <= method.bound(x.shape)
    if 4 * (1 - energy) < 1 and most == 1:
        assert (x - factors.grown(*AXES)).square().sum() <= 4 * (1 - energy) * x.square().sum()


def test_more_energy_keeps_more_and_errs_less() -> None:
    x = smooth(8, 24, 9, 9)
    geometry = ConvGeometry(in_channels=24, out_channels=8, groups=1, in_hw=(9, 9), kernel=(3, 3), stride=(1, 1),
                            dilation=(1, 1), pads=(1, 1, 1, 1))
    gy = torch.randn(8, 8, 9, 9)
    exact, sizes, errors = weight_gradient(x, gy, geometry), [], []
    for energy in (0.4, 0.7, 0.9, 0.99):
        factors = kept_by(HOSVD(energy=energy), x, geometry)
        sizes.append(factors.numel)
        errors.append(float((HOSVD().grad_weight(factors.kept(), gy, geometry) - exact).norm() / exact.norm()))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] < x.numel() / 8
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.15


def test_a_bound_is_held_where_data_do_not_compress() -> None:
    geometry = ConvGeometry(in_channels=12, out_channels=4, groups=1, in_hw=(8, 8), kernel=(1, 1), stride=(1, 1),
                            dilation=(1, 1), pads=(0, 0, 0, 0))
    x = torch.randn(6, 12, 8, 8)
    for most in (0.02, 0.1, 0.3):
        numbers = kept_by(HOSVD(energy=0.999, most=most), x, geometry).numel
        assert 0.5 * most * x.numel() < numbers <= most * x.numel()
    assert tucker_size(x.shape, ranks_within(x.shape, x.shape, 35)) == 35  # one column an axis


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_kept_whole(value: float) -> None:
    geometry = ConvGeometry(in_channels=3, out_channels=2, groups=1, in_hw=(5, 5), kernel=(3, 3), stride=(1, 1),
                            dilation=(1, 1), pads=(0, 0, 0, 0))
    x = torch.randn(2, 3, 5, 5)
    x[1, 2, 3, 4] = value
    assert kept_by(HOSVD(), x, geometry).core is x


def test_half_precision_is_kept_in_half_precision() -> None:
    x = smooth(8, 24, 9, 9, torch.bfloat16)
    geometry = ConvGeometry(in_channels=24, out_channels=8, groups=1, in_hw=(9, 9), kernel=(3, 3), stride=(1, 1),
                            dilation=(1, 1), pads=(1, 1, 1, 1))
    factors = kept_by(HOSVD(energy=0.95), x, geometry)
    assert {tensor.dtype for tensor in factors.kept().values()} == {torch.bfloat16}
    rough, close = (HOSVD().grad_weight(each.kept(), gy, geometry) for each, gy in (
        (factors, torch.ones(8, 8, 9, 9, dtype=torch.bfloat16)), (factors.to(torch.float32), torch.ones(8, 8, 9, 9))))
    assert torch.allclose(rough.float(), close, rtol=0.05, atol=0.05 * float(close.abs().max()))


def test_predicted_bytes_are_a_bound_of_those_measured() -> None:
    torch.manual_seed(0)
    model, x = scramble(NETS["Residual"]()), torch.randn(4, 3, 16, 16)
    plan = last_layers(et.trace(model, x), 4, HOSVD(energy=0.7, most=0.5))
    predicted = et.profile(model, x, plan)
    et.apply(model, plan)
    measured = et.measure(model, x, repeats=1)
    rows = {row.name: row.kept_bytes for row in measured.layers}
    assert 0 < measured.kept_bytes <= predicted.kept_bytes
    for row in predicted.layers:
        assert rows[row.name] <= row.kept_bytes
