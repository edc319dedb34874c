"""How weights lie in a packed network: as they are, as int8 with a scale a filter, as bits with one, or as whole steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from edgetune import kernels
from edgetune.packed.layers import Coding
from edgetune.recognise import ArithmeticLayer

LIMIT = 127
Tensors = Mapping[str, torch.Tensor]
M = TypeVar("M", bound=nn.Module)


def encode(weight: torch.Tensor, coding: Coding) -> dict[str, torch.Tensor]:
    """weight (o ...) as tensors by role; as bits it is signs times one magnitude a filter, (o i u v)."""
    return _ENCODE[coding](weight.detach())


def decode(tensors: Tensors, coding: Coding, shape: tuple[int, ...]) -> torch.Tensor:
    """What was encoded, as float32 of that shape."""
    if coding == "float":
        return tensors["weight"]
    scale = tensors["scale"].view(-1, *(1 for _ in shape[1:]))
    if coding == "int8":
        return tensors["weight"] * scale
    return kernels.sign_unpack(plain(tensors["weight"], shape), shape[1]) * scale


def plain(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Dense bits of filters of shape (o i u v), as kernels arrange them: int64 (o u v words)."""
    o, i, u, v = shape
    return kernels.plain_bits(weight, (o, i, u, v))


def dense_steps(steps: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers from 0 to 2^bits - 1 in `bits` bits each, in memory order, lowest first: uint8 (bytes,)."""
    each = np.unpackbits(steps.contiguous().numpy().reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(each, bitorder="little"))


def plain_steps(dense: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The other way: uint8 of that shape."""
    count = torch.Size(shape).numel()
    each = np.unpackbits(dense.contiguous().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(each, axis=1, bitorder="little")).view(shape)


def rounded(model: M) -> M:
    """A copy whose weights of convolutions and linear layers, but for those of arithmetic methods, are what int8 keeps
    of them: what `pack` makes of `model` gives its answer."""
    twin = copy.deepcopy(model)
    for layer in twin.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not isinstance(layer, ArithmeticLayer):
            layer.weight.data = decode(encode(layer.weight, "int8"), "int8", tuple(layer.weight.shape))
    return twin


def _as_float(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": weight.float().clone(memory_format=torch.contiguous_format)}


def _as_int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.float().abs().flatten(1).amax(1) / LIMIT
    steps = weight.flatten(1) / torch.where(scale > 0, scale, 1.0)[:, None]
    return {"weight": steps.round().clamp(-LIMIT, LIMIT).to(torch.int8).view(weight.shape), "scale": scale}


def _as_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": kernels.dense_bits(kernels.sign_pack(weight), weight.shape[1]),
            "scale": weight.abs().amax((1, 2, 3)).float()}


_ENCODE: Mapping[Coding, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
    "float": _as_float, "int8": _as_int8, "bits": _as_bits}
