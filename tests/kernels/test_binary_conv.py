"""Convolutions with one bit a weight from float weights to the next layer's bits; how filters are stored; refusals."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgetune import kernels
from edgetune.errors import EdgetuneError
from edgetune.kernels import BinaryLayer, fallback


def _signs(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).double()


def _reference(x: Tensor, weight: Tensor, layer: BinaryLayer) -> Tensor:
    x = F.pad(x.double(), (layer.pad_left, layer.pad_right, layer.pad_top, layer.pad_bottom), value=layer.pad_value)
    return F.conv2d(x, _signs(weight), None, (layer.stride_h, layer.stride_w), 0, (layer.dil_h, layer.dil_w),
                    layer.groups)


def _drawn(layer: BinaryLayer, n: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(layer.out_channels, layer.channels // layer.groups, layer.kernel_h, layer.kernel_w)
    return torch.randn(n, layer.channels, h, w), weight.round()


@pytest.mark.parametrize(("layer", "size"), [
    (BinaryLayer(64, 64, 3, 3, 1, 1, 1, 1, 1, 1), (1, 56, 56)),
    (BinaryLayer(64, 128, 3, 3, 2, 2, 1, 1, 1, 1), (1, 56, 56)),
    (BinaryLayer(512, 512, 3, 3, 1, 1, 1, 1, 1, 1, pad_value=1), (1, 7, 7)),
    (BinaryLayer(128, 96, 1, 1, 2, 2), (3, 15, 15)),
    (BinaryLayer(7300, 33, 3, 3, 1, 1, 1, 1, 1, 1), (1, 3, 4)),  # counts of differences beyond 16 bits
    (BinaryLayer(3, 64, 7, 7, 2, 2, 3, 3, 3, 3), (2, 30, 31)),
    (BinaryLayer(64, 64, 3, 3, 1, 1, 1, 1, 1, 1, groups=64), (2, 20, 21)),
    (BinaryLayer(130, 130, 5, 3, 2, 1, 2, 1, 2, 1, 1, 2, groups=130, pad_value=1), (1, 17, 16)),
    (BinaryLayer(9, 9, 9, 9, 1, 1, 4, 4, 4, 4, groups=9), (1, 12, 12)),  # more taps than the depthwise kernel counts
    (BinaryLayer(330, 330, 8, 8, 1, 1, 4, 4, 4, 4, groups=330), (1, 9, 9)),
    (BinaryLayer(30, 18, 3, 3, 1, 1, 1, 1, 1, 1, groups=6), (1, 9, 9)),  # groups that begin anywhere in a word
    (BinaryLayer(96, 160, 5, 5, 1, 1, 2, 2, 2, 2, groups=2, pad_value=-1), (1, 9, 9)),
    (BinaryLayer(256, 65, 3, 3, 1, 1, 2, 2, 2, 2, 2, 2), (9, 24, 24)),  # more samples than are made ready at once
], ids=str)
def test_sums_are_those_of_float64(layer: BinaryLayer, size: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x, weight = _drawn(layer, *size)
    wanted = _reference(_signs(x), weight, layer)
    bits, filters = kernels.sign_pack(x), kernels.binary_filters(weight, layer.groups)
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 3):
            torch.set_num_threads(torch_threads)
            assert torch.equal(kernels.binary_conv(bits, filters, layer).double(), wanted)
            signs = kernels.binary_conv_sign(bits, filters, layer, torch.zeros(layer.out_channels, dtype=torch.int32))
            assert torch.equal(kernels.sign_unpack(signs, layer.out_channels), _signs(wanted).float())
    finally:
        torch.set_num_threads(threads)
    octets, of_bytes = torch.randint(0, 256, x.shape, dtype=torch.uint8), layer._replace(pad_value=77)
    assert torch.equal(kernels.bit_weight_conv(octets, filters, of_bytes).double(),
                       _reference(octets, weight, of_bytes))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("layer", [BinaryLayer(128, 192, 3, 3, 1, 1, 1, 1, 1, 1), BinaryLayer(90, 90, 3, 3, groups=90),
                                   BinaryLayer(18, 42, 3, 3, groups=3)], ids=str)
def test_what_follows_in_the_same_pass_has_the_same_numbers(layer: BinaryLayer, wanted: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    x, weight = _drawn(layer, 2, 10, 11)
    o = layer.out_channels
    bits, filters = kernels.sign_pack(x), kernels.binary_filters(weight, layer.groups)
    scale, gain, shift = torch.rand(o), torch.randn(o), torch.randn(o)
    y = kernels.binary_conv(bits, filters, layer, scale)
    torch.testing.assert_close(y.double(), _reference(_signs(x), weight, layer) * scale[:, None, None], rtol=1e-6,
                               atol=1e-6)
    for norm in ((gain, shift), (None, None)):
        for residual in (torch.randn_like(y), None):
            given = *norm, residual, -1.0, 1.0, *wanted
            together = kernels.binary_conv_clip(bits, filters, layer, scale, *given)
            for found, apart in zip(together, kernels.affine_clip(y, *given), strict=True):
                assert (found is None) == (apart is None)
                if found is not None and apart is not None:
                    assert torch.equal(found, apart)
                    assert found.dtype == torch.int64 or found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(5, 64, 3, 3), (5, 128, 1, 1), (3, 7, 3, 5), (1, 1, 1, 1), (6, 100, 2, 2)])
def test_stored_filters_take_one_bit_a_weight(shape: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    bits = kernels.sign_pack(torch.randn(shape))
    dense = kernels.dense_bits(bits, shape[1])
    assert dense.numel() == (torch.Size(shape).numel() + 7) // 8
    assert torch.equal(kernels.plain_bits(dense, shape), bits)
    if shape[1] % 64 == 0:
        assert torch.equal(dense, bits.reshape(-1).view(torch.uint8))


def test_arranged_filters_take_one_bit_a_weight() -> None:
    assert kernels.binary_filters(torch.randn(64, 64, 3, 3)).numel() * 64 == 64 * 64 * 9
    assert kernels.binary_filters(torch.randn(128, 1, 3, 3), 128).numel() * 64 == 128 * 9


def test_zeros_are_positive_and_nan_is_not() -> None:
    x = torch.tensor([0.0, -0.0, float("nan"), 1e-45, -1e-45]).view(1, 5, 1, 1)
    assert kernels.sign_pack(x).item() == fallback.sign_pack(x).item() == 0b01011


def test_thresholds_are_exact() -> None:
    torch.manual_seed(0)
    scale, shift = torch.randn(400), torch.randn(400) * 30
    for at, (a, b) in enumerate([(0.0, 0.0), (-0.0, 1.0), (0.0, -1.0), (1e-30, 1.0), (-1e-30, 1.0), (0.1, -0.3),
                                 (0.1, -0.1 * 3), (float("nan"), 1.0), (1.0, float("nan")), (2.0, float("inf"))]):
        scale[at], shift[at] = a, b
    scale[10:200], shift[10:200] = scale[10:200].round(), shift[10:200].round()  # many ties
    threshold, flip = kernels.sign_thresholds(scale, shift)
    sums = torch.arange(-300, 301).double()
    wanted = sums[:, None] * scale.double() + shift.double() >= 0
    assert torch.equal((sums[:, None] >= threshold) ^ flip, wanted)


def test_thresholds_give_the_bits_of_the_float_map() -> None:
    chosen = random.Random(0)
    torch.manual_seed(0)
    layer = BinaryLayer(70, 96, 3, 3, 1, 1, 1, 1, 1, 1, pad_value=chosen.choice([-1, 0, 1]))
    x, weight = _drawn(layer, 2, 9, 9)
    bits, filters, scale, shift = kernels.sign_pack(x), kernels.binary_filters(weight), torch.randn(96), torch.randn(96)
    _, signs = kernels.binary_conv_clip(bits, filters, layer, None, scale, shift, whole=False, signs=True)
    assert signs is not None
    thresholds = kernels.sign_thresholds(scale, shift)
    assert torch.equal(kernels.binary_conv_sign(bits, filters, layer, *thresholds), signs)


def test_no_filters_and_no_samples() -> None:
    layer = BinaryLayer(8, 0, 3, 3)
    bits = kernels.sign_pack(torch.ones(1, 8, 4, 4))
    assert kernels.binary_conv(bits, kernels.binary_filters(torch.ones(0, 8, 3, 3)), layer).shape == (1, 0, 2, 2)
    some = layer._replace(out_channels=3)
    empty = kernels.sign_pack(torch.ones(0, 8, 4, 4))
    assert kernels.binary_conv(empty, kernels.binary_filters(torch.ones(3, 8, 3, 3)), some).shape == (0, 3, 2, 2)


LAYER = BinaryLayer(8, 4, 3, 3)
BITS, FILTERS = torch.zeros((1, 5, 5, 1), dtype=torch.int64), torch.zeros((1, 1, 3, 3, 1, 4), dtype=torch.int64)
BYTES = torch.zeros((1, 8, 5, 5), dtype=torch.uint8)


@pytest.mark.parametrize(("call", "name", "way_out"), [
    (lambda: kernels.sign_pack(torch.ones(1, 2, 3)), "(1, 2, 3)", "(n c h w)"),
    (lambda: kernels.sign_pack(torch.ones(1, 2, 3, 3, dtype=torch.int32)), "int32", "floats"),
    (lambda: kernels.sign_unpack(BITS, 65), "65 channels", "sign_pack"),
    (lambda: kernels.sign_unpack(BITS.int(), 8), "int32", "int64"),
    (lambda: kernels.binary_conv(BITS, FILTERS[..., :2], LAYER), "filters of shape", "binary_filters"),
    (lambda: kernels.binary_conv(BITS, FILTERS.int(), LAYER), "int32", "int64"),
    (lambda: kernels.binary_conv(BITS, FILTERS, LAYER._replace(channels=72)), "72 channels", "sign_pack"),
    (lambda: kernels.binary_conv(BITS, FILTERS, LAYER._replace(pad_value=2)), "border of 2", "-1, 0 or 1"),
    (lambda: kernels.binary_conv(BITS, FILTERS, LAYER._replace(pad_top=-1)), "-1", "crop"),
    (lambda: kernels.binary_conv(BITS, FILTERS, LAYER._replace(stride_h=0)), "stride_h=0", "at least 1"),
    (lambda: kernels.binary_conv(BITS, FILTERS, LAYER._replace(groups=3)), "3 groups", "own groups"),
    (lambda: kernels.binary_conv(BITS[:, :2], FILTERS, LAYER), "2x5 map", "larger"),
    (lambda: kernels.binary_conv(BITS, FILTERS, LAYER, torch.ones(3)), "scale", "(4,)"),
    (lambda: kernels.binary_conv(BITS, FILTERS, LAYER, torch.ones(4).double()), "float64", "float32"),
    (lambda: kernels.binary_conv_clip(BITS, FILTERS, LAYER, residual=torch.ones(1, 4, 3, 2)), "residual",
     "(1, 4, 3, 3)"),
    (lambda: kernels.binary_conv_clip(BITS, FILTERS, LAYER, gain=torch.ones(4)), "without a shift", "both or neither"),
    (lambda: kernels.binary_conv_clip(BITS, FILTERS, LAYER, whole=False), "neither values nor bits", "one of them"),
    (lambda: kernels.binary_conv_sign(BITS, FILTERS, LAYER, torch.zeros(4)), "threshold", "int32"),
    (lambda: kernels.binary_conv_sign(BITS, FILTERS, LAYER, torch.zeros(4).int(), torch.zeros(4)), "flip", "bool"),
    (lambda: kernels.bit_weight_conv(BYTES.char(), FILTERS, LAYER), "int8", "uint8"),
    (lambda: kernels.bit_weight_conv(BYTES, FILTERS, LAYER._replace(pad_value=256)), "256", "0 to 255"),
    (lambda: kernels.bit_weight_conv(BYTES[:, :7], FILTERS, LAYER), "(1, 7, 5, 5)", "n 8 h w"),
    (lambda: kernels.binary_conv(BITS, FILTERS, LAYER[:5]), "5 numbers", "BinaryLayer"),
])
def test_what_does_not_fit_is_refused_in_one_sentence(call: Any, name: str, way_out: str) -> None:
    with pytest.raises(EdgetuneError) as refusal:
        call()
    text = str(refusal.value)
    assert name in text and way_out in text and ": " in text and "\n" not in text
