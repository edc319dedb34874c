"""The native versions: each fills the outputs it is given and returns True, or returns False to decline."""

from __future__ import annotations

from typing import Any


def _declined(out: Any, *arguments: Any) -> bool:
    return False


patch_mean = patch_spread = mask_pack = mask_apply = mask_count = bits_count = masked_patch_mean = _declined
patch_mean_count = tap_sum = tap_spread = max_pool = max_pool_backward = _declined
