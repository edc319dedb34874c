"""Native code against the fallback, over the case lists."""

from __future__ import annotations

import threading

import pytest
import torch

from edgetune import kernels
from edgetune.kernels import fallback
from kernels.kernel_cases import MAKERS, as_tuple, call, cases

EXACT = {"patch_spread", "mask_pack", "mask_apply", "mask_count", "bits_count", "group_pack", "group_unpack",
         "max_pool", "bounded_sizes", "bounded_encode", "bounded_decode", "sign_pack", "sign_unpack", "arrange_filters",
         "binary_conv", "binary_conv_clip", "binary_conv_sign", "bit_weight_conv", "affine_clip", "adder_filters",
         "adder_conv_u8"}


@pytest.fixture(autouse=True)
def _native() -> None:
    if not kernels.status().native:
        pytest.skip(f"no native kernels here: {kernels.status().reason}")


@pytest.mark.parametrize("name", MAKERS)
def test_native_equals_fallback(name: str) -> None:
    for seed, arguments in cases(name):
        wanted = as_tuple(getattr(fallback, name)(*arguments))
        before = [x.clone() for x in arguments if isinstance(x, torch.Tensor)]
        got = call(name, arguments)
        for x, old in zip((x for x in arguments if isinstance(x, torch.Tensor)), before, strict=True):
            assert torch.equal(x.nan_to_num(7), old.nan_to_num(7)), f"seed {seed} changed its argument"
        for a, b in zip(got, wanted, strict=True):
            assert a.stride() == b.stride() or a.numel() == 0 or _same_memory(a, b), f"seed {seed}"
            loose = {} if name in EXACT or not a.is_floating_point() else _tolerance(a.dtype)
            torch.testing.assert_close(a, b, equal_nan=True, **(loose or {"rtol": 0, "atol": 0}),
                                       msg=lambda text, seed=seed: f"{name} seed {seed}: {text}")


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(order(a) == order(b) for order in (torch.Tensor.is_contiguous, kernels.is_channels_last))


def _tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-5}


@pytest.mark.parametrize("name", MAKERS)
def test_threads_change_nothing(name: str) -> None:
    """One thread and several give the same bits, also with several callers at once."""
    for seed, arguments in cases(name, 12):
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = call(name, arguments)
            torch.set_num_threads(3)
            together = call(name, arguments)
        finally:
            torch.set_num_threads(threads)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0, msg=f"{name} seed {seed}")


def test_several_callers_at_once() -> None:
    x = torch.randn(4, 64, 56, 56)
    wanted, wrong = kernels.patch_mean(x, 2, 2), []

    def call() -> None:
        for _ in range(30):
            if not torch.equal(kernels.patch_mean(x, 2, 2), wanted):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_a_nan_under_a_zero_bit_is_dropped() -> None:
    g = torch.tensor([float("nan"), float("inf"), 1.0, 2.0]).reshape(1, 1, 2, 2)
    bits = torch.tensor([0b1100], dtype=torch.uint8)
    assert kernels.mask_apply(g, bits).flatten().tolist() == [0, 0, 1, 2]
    assert kernels.masked_patch_mean(g, bits, 2, 2).item() == 0.75
