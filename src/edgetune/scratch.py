"""Memory that a CPU convolution takes and gives back inside one call, which tensors outside never show.

oneDNN wants maps and weights in blocks of channels: it reorders what it reads, and reorders its result back. The
allocator sees these copies, and where little is kept for backward they decide the peak. The order of allocations
below is the one that the allocator's events show (torch 2.13; `tests/test_scratch.py` compares them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

PLAIN_CHANNELS = 3
"""Up to so many input channels oneDNN reads a map as it lies: the first layer of a network."""

Arguments = Sequence[Any]
aten = torch.ops.aten


def scratch_bytes(func: Any, args: Arguments) -> int:
    """Bytes that `func`, an ATen operator, holds at its worst moment on a CPU, its results included; 0 if unknown.

    `args` are those of the call, on any device; nothing is computed.
    """
    inside = _INSIDE.get(func)
    return 0 if inside is None else inside(args)


def _forward(args: Arguments) -> int:
    x, weight, _, stride, padding, dilation, transposed, output_padding, groups = args
    out = _out_shape(x, weight, stride, padding, dilation, transposed, output_padding, groups)
    y = _bytes(out, x)
    copied = _made_dense(x) + _made_dense(weight)
    backend = _backend(x, weight, args[3:])
    if "Slow" in backend:
        return copied + y + _columns(x, weight, out, groups)
    if "Mkldnn" not in backend:
        return copied + y
    return copied + max(_read(x, weight, groups) + _size(weight) + y, 2 * y)


def _backward(args: Arguments) -> int:
    gy, x, weight, _, stride, *_, groups, mask = args
    backend = _backend(x, weight, args[4:10])
    copied = _made_dense(gy) + _made_dense(x) + _made_dense(weight)
    gx, gw = (_size(part) if wanted else 0 for part, wanted in zip((x, weight), mask, strict=False))
    if "Slow" in backend:
        return copied + gx + gw + _columns(x, weight, gy.shape, groups)
    if "Mkldnn" not in backend:
        return copied + gx + gw
    # strided, the reordered gradient of the input is made dense by one more copy
    copies = 3 if max(stride) > 1 and weight.shape[1] > 1 else 2
    data = max(_size(gy) + _size(weight) + gx, copies * gx) if mask[0] else 0
    own = max(_size(gy) + _read(x, weight, groups) + gw, 2 * gw) if mask[1] else 0
    return copied + max(data, gx + own)


_INSIDE: dict[Any, Callable[[Arguments], int]] = {
    aten.convolution.default: _forward, aten.convolution_backward.default: _backward}


def _backend(x: torch.Tensor, weight: torch.Tensor, rest: Arguments) -> str:
    """What torch would choose on a CPU, by asking it with stand-ins of the same shapes and no memory."""
    one = torch.empty(1, dtype=x.dtype)
    stand_ins = one.expand(x.shape), one.expand(weight.shape)
    return str(torch._C._select_conv_backend(*stand_ins, None, *rest, []))


def _out_shape(x: torch.Tensor, weight: torch.Tensor, stride: Sequence[int], padding: Sequence[int],
               dilation: Sequence[int], transposed: bool, output_padding: Sequence[int],
               groups: int) -> tuple[int, ...]:
    if transposed:
        sizes = ((size - 1) * s - 2 * p + d * (k - 1) + o + 1 for size, s, p, d, k, o in
                 zip(x.shape[2:], stride, padding, dilation, weight.shape[2:], output_padding, strict=True))
        return (x.shape[0], weight.shape[1] * groups, *sizes)
    sizes = ((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, s, p, d, k in
             zip(x.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True))
    return (x.shape[0], weight.shape[0], *sizes)


def _read(x: torch.Tensor, weight: torch.Tensor, groups: int) -> int:
    return 0 if x.shape[1] <= PLAIN_CHANNELS and groups == 1 else _size(x)


def _columns(x: torch.Tensor, weight: torch.Tensor, out: Sequence[int], groups: int) -> int:
    """The unfolded input of a convolution that runs as a matrix product; a 1x1 one needs none."""
    if max(weight.shape[2:]) == 1:
        return 0
    taps = weight.shape[2:].numel()
    return _bytes((x.shape[0], x.shape[1] // groups * taps, *out[2:]), x)


def _made_dense(tensor: torch.Tensor) -> int:
    """A copy, where a tensor is not dense in either memory order."""
    dense = tensor.is_contiguous() or (tensor.dim() == 4
                                       and tensor.is_contiguous(memory_format=torch.channels_last))
    return 0 if dense else _size(tensor)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(shape: Sequence[int], like: torch.Tensor) -> int:
    return torch.Size(shape).numel() * like.element_size()
