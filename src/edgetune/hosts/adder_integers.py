"""The adder layer in integers: inputs and filters in whole steps of one size, which bytes hold.

Filters are in groups, each with a step of its own. With a = round(x / step) and w whole numbers from 0 to 2^b - 1:

    y = -step (sum |a - w| + over) + shift,    over = sum of max(x / step - (2^b - 1), 0)

A network that trains and a packed one both compute it here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from edgetune import kernels
from edgetune.overlap import ConvGeometry


class Steps(NamedTuple):
    """Filters in whole steps: weight uint8 (o i u v); group int64 (o), whose step a filter counts in; step float32
    (groups); shift float32 (o), what is added to a filter's answers. Every group has a filter."""

    weight: torch.Tensor
    group: torch.Tensor
    step: torch.Tensor
    shift: torch.Tensor


class Arranged(NamedTuple):
    """The same for the kernel, group by group: bytes of filters, the channel of each int32 (o), steps, shifts, and how
    many filters each group has."""

    filters: torch.Tensor
    members: torch.Tensor
    step: torch.Tensor
    shift: torch.Tensor
    sizes: tuple[int, ...]


def arranged(steps: Steps) -> Arranged:
    """Done once a layer."""
    sizes = torch.bincount(steps.group, minlength=len(steps.step)).tolist()
    members = steps.group.argsort(stable=True)
    filters = torch.cat([kernels.adder_filters(own) for own in steps.weight[members].split(sizes)])
    return Arranged(filters, members.to(torch.int32), steps.step, steps.shift[members], tuple(sizes))


def answer(x: torch.Tensor, layer: Arranged, geometry: ConvGeometry, bits: int, exact: bool) -> torch.Tensor:
    """y (n o p q) float32, channels last, of x (n c h w); without `exact`, inputs end at the last step."""
    top, bottom, left, right = geometry.pads
    return kernels.adder_conv_steps(x.float(), layer.filters, layer.members, layer.step, layer.shift, layer.sizes,
                                    2**bits - 1, exact, geometry.kernel, geometry.stride, (top, left, bottom, right),
                                    geometry.dilation)
