"""The kernels as functions. None changes its arguments; none has a gradient formula (they serve inside one).

Shapes: x, g, gx (n c h w), float, contiguous or channels_last; other layouts are copied first. Cells are
`cell_h` x `cell_w` pixels from the top left corner; P = ceil(h/cell_h), Q = ceil(w/cell_w); the last cell of
an axis may be short and counts with its own size. Masks are one bit an element, lowest bit first, in memory
order.
Wrong arguments raise EdgetuneError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgetune.kernels import schema as _schema  # defines torch.ops.edgetune
from edgetune.kernels.binary_format import BinaryLayer
from edgetune.kernels.bounded_format import packed_size

_ops = torch.ops.edgetune
_patch_mean = _ops.patch_mean.default
_patch_spread = _ops.patch_spread.default
_mask_pack = _ops.mask_pack.default
_mask_apply = _ops.mask_apply.default
_mask_count = _ops.mask_count.default
_bits_count = _ops.bits_count.default
_masked_patch_mean = _ops.masked_patch_mean.default
_norm_backward = _ops.norm_backward.default
_grid_products = _ops.grid_products.default
_group_pack = _ops.group_pack.default
_group_unpack = _ops.group_unpack.default
_max_pool = _ops.max_pool.default
_max_pool_backward = _ops.max_pool_backward.default
_bounded_sizes = _ops.bounded_sizes.default
_bounded_encode = _ops.bounded_encode.default
_bounded_decode = _ops.bounded_decode.default
_sign_pack = _ops.sign_pack.default
_sign_unpack = _ops.sign_unpack.default
_arrange_filters = _ops.arrange_filters.default
_binary_conv = _ops.binary_conv.default
_binary_conv_clip = _ops.binary_conv_clip.default
_binary_conv_sign = _ops.binary_conv_sign.default
_bit_weight_conv = _ops.bit_weight_conv.default
_affine_clip = _ops.affine_clip.default

NAMES: tuple[str, ...] = tuple(_schema.OPS)


def patch_mean(x: Tensor, cell_h: int, cell_w: int, by_channel: bool = False) -> Tensor:
    """Mean of every cell: x (n c h w) -> (n c P Q) contiguous, same type, summed in float32.

    With `by_channel` the result lies in memory channel by channel, (c n P Q).
    """
    return _patch_mean(x, cell_h, cell_w, by_channel)


def patch_spread(v: Tensor, h: int, w: int, cell_h: int, cell_w: int, channels_last: bool = False) -> Tensor:
    """Every pixel gets its cell's value, undivided: v (n c P Q) -> (n c h w) in the asked memory order."""
    return _patch_spread(v, h, w, cell_h, cell_w, channels_last)


def mask_pack(x: Tensor, low: float, high: float) -> Tensor:
    """One bit an element, low < x < high: x of any shape -> uint8 (ceil(numel/8),), in the memory order of x.

    Half-precision values are compared in float32. A NaN is outside; unused bits of the last byte are 0.
    """
    return _mask_pack(x, low, high)


def mask_apply(g: Tensor, bits: Tensor) -> Tensor:
    """g where its bit is set, 0 elsewhere (also for a NaN): g any shape, in the memory order that was packed.

    Bring g to that order first, `g.contiguous(memory_format=...)`; `is_channels_last(x)` tells which it was.
    """
    return _mask_apply(g, bits)


def mask_count(x: Tensor, low: float, high: float, cell_h: int, cell_w: int) -> Tensor:
    """How many pixels of every cell have low < x < high: (n c P Q) uint8, int32 for cells over 255 pixels."""
    return _mask_count(x, low, high, cell_h, cell_w)


def bits_count(bits: Tensor, n: int, c: int, h: int, w: int, cell_h: int, cell_w: int,
               channels_last: bool = False) -> Tensor:
    """How many bits of every cell are set, of the mask of an (n c h w) tensor: typed like mask_count."""
    return _bits_count(bits, n, c, h, w, cell_h, cell_w, channels_last)


def masked_patch_mean(g: Tensor, bits: Tensor, cell_h: int, cell_w: int) -> Tensor:
    """patch_mean(mask_apply(g, bits)) in one pass: the sum under the mask over the size of the whole cell."""
    return _masked_patch_mean(g, bits, cell_h, cell_w)


def norm_backward(g: Tensor, bits: Tensor | None, x: Tensor | None, weight: Tensor | None, mean: Tensor, var: Tensor,
                  eps: float, wants_input: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of a norm with frozen statistics, and of the mask behind it: gx (n c h w), gw (c) and gb (c).

    g (n c h w) is the gradient behind the mask, in the memory order in which its `bits` were packed; None masks
    nothing. gw is empty without the norm's input x (n c h w), gx where it is not wanted. weight, mean, var (c); sums
    are float32, float64 for such g.
    """
    gx, gw, gb, _ = _norm_backward(g, bits, x, weight, mean, var, eps, wants_input)
    return gx, gw, gb


def grid_products(g: Tensor, to_input: Tensor | None, to_weight: Tensor | None, x: Tensor | None, w: Tensor,
                  groups: int, wants_input: bool = True, spread: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """Both channel products of a backward pass on the grid: g (n o p q), x (n c p q), w (o i u v) -> gx, gw.

    gx (n c p q), in memory channel by channel, is the sum over taps of w, transposed, times g `to_input`; gw the
    product over samples and cells of g `to_weight` and x: (o i), or with `spread` (o i u v) in the memory order of w,
    the same at every tap. `to_input` and `to_weight` (p q) multiply g cell by cell; None is 1. What is not wanted
    (gx unless `wants_input`, gw unless x is given) is None. Fastest where g and x lie channel by channel.
    """
    gx, gw, _ = _grid_products(g, to_input, to_weight, x, w, groups, wants_input, spread)
    return gx if wants_input else None, None if x is None else gw


def group_pack(x: Tensor, bits: int, group: int, seed: int, stochastic: bool = True) -> Tensor:
    """x of any shape, in codes of 8, 4 or 2 bits -> uint8 (size,), in the memory order of x, compared as float32.

    Every `group` elements (a multiple of 32; the last group may be short) have a least value, in float32, and a step,
    in bfloat16, rounded up: 6 bytes. The codes between follow, filled up to a multiple of 8 bytes. A value becomes one
    of the two codes beside it: which one, chance says, such that the mean over seeds is the value, up to 2^-17 of a
    step and the rounding of float32; or without `stochastic` the nearer one. Chance comes from `seed` and the element's
    place alone. A group that is constant comes back exactly. One with a NaN, an infinity or a magnitude over 2^126
    comes back as NaN. Steps are 2^-110 at least.
    """
    return _group_pack(x, bits, group, seed, stochastic)


def group_unpack(packed: Tensor, bits: int, group: int, elements: int) -> Tensor:
    """What group_pack wrote: uint8 (size,) -> float32 (elements,), in the order that was packed."""
    return _group_unpack(packed, bits, group, elements)


def max_pool(x: Tensor, kernel_h: int, kernel_w: int, stride_h: int, stride_w: int, pad_h: int, pad_w: int,
             dil_h: int, dil_w: int, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """Max-pool that keeps one byte per output: x (n c h w) -> y (n c p q), index uint8 (n c p q).

    `index` is the winner's position row*kernel_w + column in its window, 255 where that sees padding only.
    y is bit-identical to F.max_pool2d, and ties and NaN go to the same element. Both outputs have the memory
    order of x. Windows up to 255 pixels.
    """
    return _max_pool(x, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, ceil_mode)


def max_pool_backward(gy: Tensor, index: Tensor, h: int, w: int, kernel_h: int, kernel_w: int, stride_h: int,
                      stride_w: int, pad_h: int, pad_w: int, dil_h: int, dil_w: int) -> Tensor:
    """Gradient of max_pool: gy, index (n c p q) -> gx (n c h w) in the memory order of index."""
    return _max_pool_backward(gy, index, h, w, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dil_h,
                              dil_w)


def bounded_sizes(x: Tensor, bound: float) -> Tensor:
    """Bytes of every chunk of x (any shape) at an absolute error bound, 0 being exact: int32 (chunks).

    How the bytes lie is told in native/bounded.h, and in bounded_format.py how large header and table are.
    """
    return _bounded_sizes(x, bound)


def bounded_encode(x: Tensor, sizes: Tensor, bound: float) -> Tensor:
    """x of any shape -> uint8 (bytes), with what bounded_sizes gave for the same x and bound.

    Zeros stay zeros and nothing else becomes one. What is not finite, and what is more than 2^20 cells from zero, is
    kept exactly.
    """
    return _bounded_encode(x, sizes, bound, packed_size(sizes))


def bounded_decode(packed: Tensor, count: int) -> Tensor:
    """uint8 (bytes) -> float32 (count). Raises EdgetuneError for bytes that bounded_encode has not made so."""
    return _bounded_decode(packed, count)


def sign_pack(x: Tensor) -> Tensor:
    """Where x (n c h w) is at least 0, so at 0 and -0 too, and not at a NaN: int64 (n h w ceil(c/64)).

    The lowest bit is the lowest channel, and the last word is filled up with 0 bits.
    """
    return _sign_pack(x)


def sign_unpack(bits: Tensor, channels: int) -> Tensor:
    """+1 where a bit is set, else -1: what sign_pack wrote -> float32 (n c h w), channels last."""
    return _sign_unpack(bits, channels)


def arrange_filters(bits: Tensor, channels: int, groups: int = 1) -> Tensor:
    """Plain bits of filters, int64 (o u v words), as the convolutions read them: int64 (groups blocks u v bytes 4).

    Of a depthwise layer: int64 (u v words). Plain bits are sign_pack(weight (o i u v)), and i * groups is `channels`.
    binary_format.py has both formats.
    """
    return _arrange_filters(bits, channels, groups)


def binary_conv(bits: Tensor, filters: Tensor, layer: BinaryLayer, scale: Tensor | None = None) -> Tensor:
    """Convolution of +-1 with +-1: sign_pack's bits and arranged filters -> float32 (n o p q), channels last.

    The sum, times scale float32 (o). It is exact, also at a border of zeros (layer.pad_value 0; -1 and +1 are ordinary
    bits).
    """
    return _binary_conv(bits, filters, scale, layer)


def binary_conv_clip(bits: Tensor, filters: Tensor, layer: BinaryLayer, scale: Tensor | None = None,
                     gain: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
                     low: float = -math.inf, high: float = math.inf, whole: bool = True,
                     signs: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """What affine_clip makes of binary_conv's answer, in one pass and with the same numbers."""
    y, out = _binary_conv_clip(bits, filters, scale, gain, shift, residual, low, high, whole, signs, layer)
    return y if whole else None, out if signs else None


def binary_conv_sign(bits: Tensor, filters: Tensor, layer: BinaryLayer, threshold: Tensor,
                     flip: Tensor | None = None) -> Tensor:
    """Where the sums of binary_conv are at least the threshold int32 (o): bits as sign_pack(y) has them.

    Where flip, bool (o), is True: where they are not. So all steps are expressible: filters.sign_thresholds gives the
    two for the sign of scale*sum + shift; a threshold of -2^31 is always reached, 2^31-1 never.
    """
    return _binary_conv_sign(bits, filters, threshold, flip, layer)


def bit_weight_conv(x: Tensor, filters: Tensor, layer: BinaryLayer, scale: Tensor | None = None,
                    shift: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """Convolution of x uint8 (n c h w) with +-1: arranged filters -> int32 (n o p q), channels last, exact.

    With a scale, shift (o) or residual (n o p q), float32, it is float32: scale*sum + shift, rounded once where the CPU
    fuses it, + residual. The border counts as layer.pad_value, 0 to 255. Fastest where x lies channels last.
    """
    return _bit_weight_conv(x, filters, scale, shift, residual, layer)


def affine_clip(x: Tensor, gain: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None,
                low: float = -math.inf, high: float = math.inf, whole: bool = True,
                signs: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """gain*x + shift, rounded once where the CPU fuses it, + residual, kept in [low, high]; and sign_pack of that.

    x and residual float32 (n c h w), gain and shift (c), both or neither -> a map, channels last, with `whole`, and
    bits with `signs`; what is not wanted is None. A NaN goes through.
    """
    y, bits = _affine_clip(x, gain, shift, residual, low, high, whole, signs)
    return y if whole else None, bits if signs else None
