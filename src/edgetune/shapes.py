"""The axis alphabet, and one check that speaks it.

n samples · c channels · h w rows and columns · o output channels · i input channels (of one group)
u v kernel rows and columns · p q rows and columns of the patch grid
"""

from __future__ import annotations

from functools import cache

import torch

from edgetune.errors import EdgetuneError


@cache
def _names(axes: str) -> tuple[str, ...]:
    return tuple(axes.split())


def expect(x: torch.Tensor, axes: str, **sizes: int) -> tuple[int, ...]:
    """Check that `x` has the axes of `axes` (such as "n c h w") and the given sizes; return its shape.

    Raises EdgetuneError naming the axis that is wrong.
    """
    names = _names(axes)
    if x.dim() != len(names):
        raise EdgetuneError(f"a tensor of shape {tuple(x.shape)} stands where ({axes}) is expected: "
                            f"give {len(names)} axes")
    for name, size in zip(names, x.shape, strict=True):
        if name in sizes and sizes[name] != size:
            raise EdgetuneError(f"axis {name} of ({axes}) is {size}, expected {sizes[name]}: "
                                "check that the tensor belongs to this layer")
    return tuple(x.shape)
