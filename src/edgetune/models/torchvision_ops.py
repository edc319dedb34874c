"""Importing torchvision beside a CPU-only torch.

The torchvision wheel of the package registry is built for CUDA: next to a CPU torch its compiled library does
not load, and its Python part then fails on registering fake kernels for operators that nobody declared.
Declaring their names first is enough for every classification network; the detection operators themselves
stay unusable.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

_NAMES = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "deform_conv2d",
    "_deform_conv2d_backward",
)

_declared: list[torch.library.Library] = []  # a Library forgets its operators when it is collected


def import_torchvision_aware(name: str) -> ModuleType:
    """Import torchvision, or something that needs it (timm), declaring its operators if their library is
    missing.

    Raises ImportError when the package itself is absent.
    """
    try:
        return importlib.import_module(name)
    except RuntimeError as failure:
        if "torchvision::" not in str(failure) or _declared:
            raise ImportError(str(failure)) from failure
    for half_imported in [
        key for key in sys.modules if key.split(".")[0] in ("torchvision", name.split(".")[0])
    ]:
        del sys.modules[half_imported]
    library = torch.library.Library("torchvision", "FRAGMENT")
    _declared.append(library)
    for operator in _NAMES:
        if not torch._C._dispatch_has_kernel(f"torchvision::{operator}"):
            library.define(f"{operator}(Tensor x) -> Tensor")
    return importlib.import_module(name)
