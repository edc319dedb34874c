"""DIR-Net: binary weights that carry most information, and a surrogate gradient that sharpens while it trains.

What it does
    A filter is balanced (its mean is taken off) and standardised before its signs are taken, so that both signs are
    as frequent and flip easily; its scale is a power of two. Signs of weights and of what the layer reads have a
    surrogate derivative that begins as 1 everywhere and ends as a narrow peak at 0. `alive` keeps the peak from
    becoming so narrow that fewer than that share of a tensor's values receive a gradient; 0 leaves the schedule as it
    is, which is IR-Net. Distilling the float network's features is the third part: see `edgetune.compress`.

Shapes
    x (n c h w), weight (o i u v), y (n o p q); scale (o)

What is kept (bytes)
    n c h w / 8 for the signs of the input and `slope_bits` n c h w / 8 for the slope of its surrogate. A norm behind
    the layer keeps two numbers a channel: what it reads is made again. Packed: one bit a weight.

What changes in the gradient or the answer
    w' = (w - mean w) / std w, y = 2^s sum sign(x) sign(w'), s = round(log2 mean |w'|); the gradient goes through mean
    and deviation, not through s. d sign(x)/dx := k t (1 - tanh(t x)^2), t from `t_min` to `t_max` by equal factors over
    the training, k = max(1/t, 1). With `alive` = e, t is at most atanh(sqrt(0.9)) / q, q the e-quantile of |x|: then
    a share e of the values has at least a tenth of the peak's derivative. Slopes are kept rounded, by less than
    1 / (2^(slope_bits + 1) - 2) of their range in a group of 256.

When not to use
    In the first and the last layer and in depthwise layers. The narrow end needs a long training: for a few epochs a
    `t_max` near 1, or `xnor`, learns faster.

Reference
    Qin et al., "Distribution-Sensitive Information Retention for Accurate Binary Neural Network", IJCV 2022; Qin et
    al., "Forward and Backward Information Retention for Accurate Binary Neural Networks" (IR-Net), CVPR 2020, whose
    released code gives balance, deviation, shift and schedule. A Gaussian filter has mean |w'| = 0.798, so s is 0
    unless a filter is strongly peaked. How the distribution bounds t is not public: the quantile above is a
    reconstruction that does what the paper asks for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from edgetune import kernels
from edgetune.contract import Tensors
from edgetune.hosts.arithmetic import share
from edgetune.hosts.binary import BinaryMethod, signs_of, with_slope

GROUP = 256
ALIVE = math.atanh(math.sqrt(0.9))
"""t |x| at which the surrogate's derivative is a tenth of its peak."""
SAMPLE = 4096
"""Values of a tensor from which its quantile is taken."""


def standardised(weight: torch.Tensor) -> torch.Tensor:
    """weight (o i u v), each filter with mean 0 and deviation 1; a filter of equal weights becomes 0."""
    centred = weight - weight.mean((1, 2, 3), keepdim=True)
    size = weight[0].numel() if len(weight) else 0
    variance = centred.square().sum((1, 2, 3), keepdim=True) / max(size - 1, 1)
    return centred / torch.where(variance > 0, variance, 1.0).sqrt()


def shift_of(weight: torch.Tensor) -> torch.Tensor:
    """2^round(log2 mean |w|) of each filter: (o 1 1 1); 1 for a filter of zeros."""
    mean = weight.abs().mean((1, 2, 3), keepdim=True)
    return torch.where(mean > 0, mean, 1.0).log2().round().exp2()


def quantile_of(x: torch.Tensor, portion: float) -> torch.Tensor:
    """The `portion`-quantile of |x|, from at most `SAMPLE` of its values, evenly spaced: ()."""
    flat = x.detach().reshape(-1)
    if not flat.numel():
        return x.new_zeros(())
    some = flat[::max(1, flat.numel() // SAMPLE)].abs()
    return some.sort().values[min(len(some) - 1, int(portion * len(some)))]


def surrogate(x: torch.Tensor, sharpness: torch.Tensor) -> torch.Tensor:
    """The derivative k t (1 - tanh(t x)^2) with t = sharpness, k = max(1/t, 1)."""
    height = sharpness.clamp(min=1.0)  # k t
    return height * (1 - torch.tanh(sharpness * x).square())


class DIRNet(BinaryMethod):
    """Of one layer."""

    method = "dir_net"
    recipe: ClassVar[Mapping[str, Any]] = {"optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 1e-4}
    straight_through: ClassVar[bool] = False

    t_min: float = Field(1e-3, gt=0, description="sharpness of the surrogate at the beginning")
    t_max: float = Field(10.0, gt=0, description="sharpness of the surrogate at the end")
    alive: float = Field(0.1, ge=0, lt=1, description="share of a tensor's values that a gradient must reach; "
                         "0 is IR-Net")
    slope_bits: Literal[2, 4, 8] = Field(4, description="bits a value in which training keeps slopes")

    @property
    def label(self) -> str:
        return super().label if self.alive else super().label.replace("dir net", "ir net")

    def sharpness(self, x: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        """t of a tensor at this point of the training: ()."""
        planned = x.new_tensor(self.t_min * (self.t_max / self.t_min) ** share(progress))
        if not self.alive:
            return planned
        return torch.minimum(planned, ALIVE / quantile_of(x, self.alive))

    def slope(self, x: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        return surrogate(x.detach(), self.sharpness(x, progress))

    def keep_slope(self, x: torch.Tensor, progress: torch.Tensor) -> dict[str, torch.Tensor]:
        slopes = self.slope(x, progress).contiguous()
        return {"slope": kernels.group_pack(slopes, self.slope_bits, GROUP, 0, False)}

    def times_slope(self, g: torch.Tensor, kept: Tensors) -> torch.Tensor:
        slopes = kernels.group_unpack(kept["slope"], self.slope_bits, GROUP, g.numel())
        return g * slopes.view(g.shape).to(g.dtype)

    def quantize_weight(self, weight: torch.Tensor, progress: torch.Tensor) -> torch.Tensor:
        even = standardised(weight)
        return shift_of(even).detach() * with_slope(signs_of(even), even, self.slope(even, progress))
