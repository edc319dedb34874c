"""Where the windows of a convolution-like kernel lie, checked once for the meta, fallback and native versions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from edgetune.errors import EdgetuneError
from edgetune.shapes import expect


class Windows(NamedTuple):
    """Sizes in pixels: kernel, stride and dilation (rows, columns); pads (top, left, bottom, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    def out_size(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of the output. Raises EdgetuneError where none is left."""
        top, left, bottom, right = self.pads
        (ku, kv), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        p, q = (h + top + bottom - dh * (ku - 1) - 1) // sh + 1, (w + left + right - dw * (kv - 1) - 1) // sw + 1
        if p < 1 or q < 1:
            raise EdgetuneError(f"a {h}x{w} map is smaller than the window {self}: give a larger map or pad it")
        return p, q

    def taps(self) -> list[tuple[int, int]]:
        """Row and column of every tap of the kernel."""
        return [(u, v) for u in range(self.kernel[0]) for v in range(self.kernel[1])]

    def seen(self, padded: Tensor, tap: tuple[int, int], p: int, q: int) -> Tensor:
        """What a tap reads: a view (n c p q) of the padded map."""
        (u, v), (sh, sw), (dh, dw) = tap, self.stride, self.dilation
        return padded[:, :, u * dh : u * dh + (p - 1) * sh + 1 : sh, v * dw : v * dw + (q - 1) * sw + 1 : sw]


def windows(kernel: Sequence[int], stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int],
            groups: int) -> Windows:
    """The same, checked. Raises EdgetuneError where a size is missing or too small."""
    return _checked(tuple(kernel), tuple(stride), tuple(pads), tuple(dilation), groups)


@lru_cache(maxsize=1024)
def _checked(kernel: tuple[int, ...], stride: tuple[int, ...], pads: tuple[int, ...], dilation: tuple[int, ...],
             groups: int) -> Windows:
    if [len(kernel), len(stride), len(pads), len(dilation)] != [2, 2, 4, 2]:
        raise EdgetuneError(f"stride {list(stride)}, pads {list(pads)} and dilation {list(dilation)} don't describe "
                            "windows: give 2, 4 (top, left, bottom, right) and 2 sizes")
    if min(*kernel, *stride, *dilation, groups) < 1 or min(pads) < 0:
        raise EdgetuneError(f"kernel {list(kernel)}, stride {list(stride)}, pads {list(pads)}, dilation "
                            f"{list(dilation)} or groups {groups} is too small: give at least 1, and 0 for pads")
    return Windows((kernel[0], kernel[1]), (stride[0], stride[1]), (pads[0], pads[1], pads[2], pads[3]),
                   (dilation[0], dilation[1]), groups)


def windows_of(x: Tensor, weight: Tensor, stride: Sequence[int], pads: Sequence[int], dilation: Sequence[int],
               groups: int) -> Windows:
    """The windows in x (n c h w) of a weight (o i u v). Raises EdgetuneError where they don't belong together."""
    expect(x, "n c h w")
    o, i, u, v = expect(weight, "o i u v")
    found = windows((int(u), int(v)), stride, pads, dilation, groups)  # a traced size becomes a number
    if o % groups or x.shape[1] != i * groups:
        raise EdgetuneError(f"{x.shape[1]} channels and a weight of {o} filters of {i} channels don't make {groups} "
                            "groups: give the layer's own weight and groups")
    if x.dtype != weight.dtype:
        raise EdgetuneError(f"x is {x.dtype} and the weight {weight.dtype}: give both in one type")
    return found
