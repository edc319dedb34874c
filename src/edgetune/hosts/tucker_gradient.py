"""The weight gradient of a convolution from its output's gradient and the Tucker factors of its input.

The input is never made whole again. The batch basis is carried to gy, which leaves `a` images instead of n; the bases
of rows and columns are multiplied into the core, which is small; and for channels the cheaper of two orders is taken:

    core's channels    gw = (weight gradient with b input channels) c^T       one convolution without groups
    input's channels   gw = weight gradient of the a images, channels grown   the layer's own groups, some at a time

A pointwise layer without groups has its gy carried to the bases of rows and columns, too, and nothing is grown at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgetune.hosts.conv import weight_gradient
from edgetune.hosts.tucker import AXES, Tucker, product, unfolded
from edgetune.kernels import is_channels_last
from edgetune.kernels.geometry import memory_format
from edgetune.overlap import ConvGeometry

SHARE = 8
"""Channels are grown in pieces that are at most one part in so many of the input, or a group where that is more."""


def factored_weight_gradient(factors: Tucker, gy: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
    """gw (o i u v) from the factors of x (n c h w) and gy (n o p q), for every geometry."""
    factors, samples = factors.to(gy.dtype), gy.shape[0]
    if geometry.kernel == (1, 1) and geometry.groups == 1 and not any(geometry.pads):
        return _pointwise(factors, gy, geometry.stride)
    g = product(gy, factors.bases["n"].mT, 0) if "n" in factors.bases else gy
    images = factors.grown("h", "w").contiguous(memory_format=memory_format(is_channels_last(g)))
    basis = factors.bases.get("c")
    if basis is None:
        return weight_gradient(images, g, geometry)
    if in_core_channels(geometry, images.shape[0], basis.shape[1]):
        return _through_core(images, basis, g, geometry)
    pieces = max(1, min(geometry.groups, -(-SHARE * images.shape[0] // max(samples, 1))))
    return _through_groups(images, basis, g, geometry, pieces)


def _pointwise(factors: Tucker, gy: torch.Tensor, stride: tuple[int, int]) -> torch.Tensor:
    """gw (o i 1 1): gy is carried to every basis, and meets the core; no map is grown."""
    core, bases = factors.core, {name: basis for name, basis in factors.bases.items() if name != "c"}
    for name, step in zip("hw", stride, strict=True):
        if step > 1 and name in bases:
            bases[name] = bases[name][::step]
        elif step > 1:
            core = core[(slice(None),) * AXES.index(name) + (slice(None, None, step),)]
    g = gy
    for name, basis in sorted(bases.items(), key=lambda each: each[1].shape[1] / each[1].shape[0]):
        g = product(g, basis.mT, AXES.index(name))
    gw = unfolded(core, 1, like=g).mm(unfolded(g, 1).t()).t()
    return (gw.mm(factors.bases["c"].t()) if "c" in factors.bases else gw)[:, :, None, None]


def in_core_channels(geometry: ConvGeometry, images: int, rank: int) -> bool:
    """Whether to multiply with the channel basis (c b) last: by multiply-accumulates for so many images."""
    taps, pixels = geometry.kernel[0] * geometry.kernel[1], geometry.out_hw[0] * geometry.out_hw[1]
    per_group, grown = geometry.in_channels // geometry.groups, geometry.in_hw[0] * geometry.in_hw[1]
    last = geometry.out_channels * taps * rank * (images * pixels + per_group)
    first = images * (geometry.out_channels * taps * per_group * pixels + geometry.in_channels * rank * grown)
    return last <= first


def _through_core(images: torch.Tensor, basis: torch.Tensor, g: torch.Tensor,
                  geometry: ConvGeometry) -> torch.Tensor:
    """images (a b h w), basis (c b), g (a o p q) -> gw (o i u v)."""
    whole = geometry.model_copy(update={"in_channels": basis.shape[1], "groups": 1})
    small = weight_gradient(images, g, whole).permute(0, 2, 3, 1)  # (o u v b)
    per_group = small.reshape(geometry.groups, -1, basis.shape[1]) @ basis.unflatten(0, (geometry.groups, -1)).mT
    return per_group.view(*small.shape[:3], -1).permute(0, 3, 1, 2)


def _through_groups(images: torch.Tensor, basis: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry,
                    pieces: int) -> torch.Tensor:
    """The same, with channels grown group by group, in so many pieces."""
    own, out = geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups
    found, first = [], 0
    for groups in (len(part) for part in torch.arange(geometry.groups).tensor_split(pieces)):
        part = geometry.model_copy(update={"groups": groups, "in_channels": own * groups, "out_channels": out * groups})
        grown = F.conv2d(images, basis[own * first:own * (first + groups), :, None, None])  # keeps the order of images
        found.append(weight_gradient(grown, g[:, out * first:out * (first + groups)], part))
        first += groups
    return torch.cat(found)
