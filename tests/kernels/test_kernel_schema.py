"""The ops as torch sees them: schema, meta tensors, modes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from edgetune import kernels
from edgetune.errors import EdgetuneError
from kernels import adder_cases
from kernels.kernel_cases import MAKERS, call, cases


def test_names_are_the_ops() -> None:
    assert set(MAKERS) == set(kernels.NAMES) == set(kernels.build.OPS)
    assert all(callable(getattr(kernels, name)) and getattr(kernels, name).__doc__ for name in kernels.NAMES)


@pytest.mark.parametrize("name", MAKERS)
def test_opcheck(name: str) -> None:
    for _, arguments in list(cases(name, 6)):
        # opcheck compares by ==, which no NaN passes
        finite = [x.nan_to_num(0, 1, -1) if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(getattr(torch.ops.edgetune, name).default, tuple(finite))


@pytest.mark.parametrize("name", MAKERS)
def test_meta_agrees(name: str) -> None:
    for seed, arguments in cases(name, 20):
        real = call(name, arguments)
        away = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
        for a, b in zip(real, call(name, away), strict=True):
            assert (a.shape, a.dtype, b.device.type) == (b.shape, b.dtype, "meta"), f"seed {seed}"
            assert a.is_contiguous() == b.is_contiguous(), f"seed {seed}"


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_modes_see_one_op() -> None:
    with _Names() as mode:
        kernels.patch_mean(torch.ones(1, 2, 4, 4), 2, 2)
    assert mode.seen.count("edgetune::patch_mean") == 1


@pytest.mark.parametrize("call", [
    lambda: kernels.patch_mean(torch.ones(2, 3, 4), 2, 2),
    lambda: kernels.patch_mean(torch.ones(1, 2, 3, 4), 0, 2),
    lambda: kernels.patch_spread(torch.ones(1, 2, 2, 2), 5, 4, 2, 2),
    lambda: kernels.mask_apply(torch.ones(9), torch.zeros(1, dtype=torch.uint8)),
    lambda: kernels.mask_apply(torch.ones(8), torch.zeros(1)),
    lambda: kernels.bits_count(torch.zeros(3, dtype=torch.uint8), 1, 1, 4, 4, 2, 2),
    lambda: kernels.masked_patch_mean(torch.ones(1, 1, 4, 4), torch.zeros(3, dtype=torch.uint8), 2, 2),
    lambda: kernels.grid_products(torch.ones(1, 4, 2, 2), None, None, None, torch.ones(3, 2, 1, 1), 1),
    lambda: kernels.grid_products(*torch.ones(1, 1, 4, 2, 2), None, None, torch.ones(1, 3, 2, 2),
                                  torch.ones(4, 2, 1, 1), 1),
    lambda: kernels.grid_products(*torch.ones(1, 1, 4, 2, 2), torch.ones(3, 2), None, None, torch.ones(4, 2, 1, 1), 1),
    lambda: kernels.group_pack(torch.ones(9), 3, 256, 0),
    lambda: kernels.group_pack(torch.ones(9), 4, 40, 0),
    lambda: kernels.group_pack(torch.ones(9), 4, 0, 0),
    lambda: kernels.group_unpack(torch.zeros(14, dtype=torch.uint8), 4, 256, 17),
    lambda: kernels.group_unpack(torch.zeros(14), 4, 256, 16),
    lambda: kernels.max_pool(torch.ones(1, 1, 40, 40), 16, 16, 1, 1, 0, 0, 1, 1, False),
    lambda: kernels.max_pool(torch.ones(1, 1, 4, 4), 3, 3, 1, 1, 2, 2, 1, 1, False),
    lambda: kernels.max_pool(torch.ones(1, 1, 2, 2), 3, 3, 1, 1, 0, 0, 1, 1, False),
    lambda: kernels.max_pool_backward(*torch.ones(2, 1, 1, 2, 2), 4, 4, 2, 2, 2, 2, 0, 0, 1, 1),
    *adder_cases.WRONG,
])
def test_wrong_arguments_are_refused_in_one_sentence(call: Any) -> None:
    with pytest.raises(EdgetuneError) as refusal:
        call()
    assert ": " in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types_take_the_fallback(dtype: torch.dtype) -> None:
    x = torch.arange(16, dtype=dtype).reshape(1, 1, 4, 4)
    assert kernels.patch_mean(x, 2, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert kernels.mask_count(x, 0, 9, 2, 2).flatten().tolist() == [3, 4, 1, 0]


def test_a_damaged_index_writes_nowhere_else() -> None:
    gy, index = torch.ones(1, 1, 3, 3), torch.full((1, 1, 3, 3), 200, dtype=torch.uint8)
    if kernels.status().native:
        assert kernels.max_pool_backward(gy, index, 5, 5, 3, 3, 2, 2, 1, 1, 1, 1).sum() == 0
    index = torch.zeros_like(index)  # the first position lies in the padding at the top left
    if kernels.status().native:
        assert kernels.max_pool_backward(gy, index, 5, 5, 3, 3, 2, 2, 1, 1, 1, 1).sum() == 4
