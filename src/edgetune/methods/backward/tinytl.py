"""TinyTL: the pretrained weights stay as they are; biases learn, and small residual branches beside the blocks.

What it does
    A plan gives it to a block. There it adds a branch `lite`, which learns: the block's input at half the resolution,
    a group convolution, norm, ReLU, a 1x1 convolution, norm, made as large as the block's output and added to it. The
    last norm's scale starts at zero, and so does what the branch adds. Biases (shifts of norms among them) and the
    head learn as well. `last_blocks` writes the plan: lite residuals with biases, one without the other, in all blocks
    or in the last ones.

Shapes
    x (n c h w), block y (n o h' w'), s = h / h' rounded, r = `reduction`: pooled (n c h/r w/r), the rest of it left out
    conv1 (c c/groups k k), stride s; conv2 (o c 1 1); norms over groups of channels, at least eight in each
    lite (n o h/rs w/rs), by bilinear interpolation (n o h' w')

What is kept (bytes)
    A branch: 4 n c h w / r^2 for its first convolution, m = n h w / (r s)^2 numbers a channel behind it: 8 m c and
    m c / 8 for its first norm, ReLU and second convolution, 4 m o for its last norm; 8 n a group of channels. Pooling
    and interpolation keep nothing, biases neither, and frozen convolutions nothing: of the block itself there remain
    what the slopes of its activations take (a bit a value for ReLU, the input of a hard-swish) and what
    squeeze-excite scales. Where biases do not learn, the first block with a branch keeps none of these either.

What changes in the gradient or the answer
    Gradients are exact. The answer is that of the pretrained network until the first step: zero is added. While the
    last scale is zero, it is the only parameter of the branch with a gradient other than zero.

When not to use
    Where the memory is enough to train the blocks themselves. A branch computes in every later forward pass, so the
    trained network is somewhat slower and larger than it was, and `undo` takes the branches away with all they
    learned: `edgetune.apply.rewrite` in front of `apply` makes them stay. Networks without blocks are refused.

Reference
    Cai, Gan, Zhu and Han, "TinyTL: Reduce Memory, Not Parameters for Efficient On-Device Learning", NeurIPS 2020,
    sections 3.2 and 3.3. Kernel 5, 2 groups, half resolution, the order of the layers, the zero at the end, and that
    the last shift learns only where biases do not, are as in the released code. There all norms of the network are
    group norms, weights are standardised, and the branches come pretrained; here the network's own norms stay, only
    the branch has group norms, and it begins with He-normal weights. There a branch is added in front of a block's
    activation and of its shortcut's sum; here behind them, so that any block can have one.
"""

from __future__ import annotations

import math
import types
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from edgetune.blocks import BLOCK, blocks, calls_of
from edgetune.contract import Method, Plan, qualified
from edgetune.errors import PlanError, Refusal
from edgetune.graph import Call, Graph

LITE = "lite"
CHANNELS_A_GROUP = 8
"""Channels that share a mean and a deviation in the branch's norms, at least."""


def pooled(x: torch.Tensor, size: int) -> torch.Tensor:
    """The mean of each square of x (n c h w), `size` wide: (n c h/size w/size). Stock pooling would keep x."""
    height, width = x.shape[2] // size, x.shape[3] // size
    rows = x[:, :, :height * size].unflatten(2, (height, size)).mean(3)
    return rows[:, :, :, :width * size].unflatten(3, (width, size)).mean(4)


def norm_groups(channels: int) -> int:
    """The most groups of at least `CHANNELS_A_GROUP` channels that `channels` are divided into."""
    return max(count for count in range(1, max(1, channels // CHANNELS_A_GROUP) + 1) if channels % count == 0)


class Lite(nn.Module):
    """The branch: x (n c h w) -> (n o h/rs w/rs), zero at first."""

    def __init__(self, settings: TinyTL, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        kernel = settings.kernel_size
        self.reduction = settings.reduction
        self.conv1 = nn.Conv2d(in_channels, in_channels, kernel, stride, kernel // 2, groups=settings.groups,
                               bias=False)
        self.norm1 = nn.GroupNorm(norm_groups(in_channels), in_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm2 = nn.GroupNorm(norm_groups(out_channels), out_channels)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        small = pooled(x, self.reduction) if self.reduction > 1 else x
        return self.norm2(self.conv2(self.relu(self.norm1(self.conv1(small)))))


def _with_lite(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The forward of a block that has a branch, which reads x first: a block may write into its input."""
    small = self.get_submodule(LITE)(x)
    y: torch.Tensor = type(self).forward(_without_lite(self), x)
    return y + F.interpolate(small, y.shape[2:], mode="bilinear")


def _without_lite(block: nn.Module) -> nn.Module:
    """The block as it was, with the same parameters: Sequential, for one, would run every child that it has."""
    twin: nn.Module = object.__new__(type(block))
    twin.__dict__ = {**vars(block), "_modules": {name: m for name, m in block._modules.items() if name != LITE}}
    return twin


def stride_of(block: Call) -> int:
    """How many times a block shrinks its map."""
    return max(1, round(block.in_shapes[0][2] / block.out_shape[2]))


class TinyTL(Method):
    """Of a block: its branch, and in plans that `last_blocks` writes, whether biases learn beside it."""

    method = "tinytl"
    rewrites = True

    kernel_size: int = Field(5, ge=1, description="of the branch's first convolution, odd")
    groups: int = Field(2, ge=1, description="of the branch's first convolution")
    reduction: int = Field(2, ge=1, description="how many times smaller the branch's maps are")
    residuals: bool = Field(True, description="whether blocks get branches")
    biases: bool = Field(True, description="whether biases learn")
    seed: int = Field(0, description="of the branch's first weights")

    @model_validator(mode="after")
    def _holds(self) -> TinyTL:
        if self.kernel_size % 2 == 0:
            raise ValueError("kernel_size must be odd")
        if not (self.residuals or self.biases):
            raise ValueError("residuals, biases or both must learn")
        return self

    def refuse(self, call: Call) -> str | None:
        if call.kind != BLOCK:
            return f"is a {call.kind} layer, not a block: give it to a submodule that takes a map and gives one"
        channels, size = call.in_shapes[0][1], min(call.in_shapes[0][2:])
        if not self.residuals:
            return "has residuals=false, so that it gets no branch: take it out of `layers`"
        if channels % self.groups:
            return f"has {channels} channels, which are not divided by groups={self.groups}: choose other groups"
        return None if size >= self.reduction else (f"has maps of {size} pixels, too few for "
                                                    f"reduction={self.reduction}: choose a smaller one")

    def rewrite(self, module: nn.Module, block: Call) -> Callable[[], None]:
        taken = next((name for name in (LITE, "forward") if name in {**module.__dict__, **module._modules}), None)
        if taken is not None:
            raise Refusal(block.name, f"has a {taken} of its own", "take it out of the plan")
        like = next(module.parameters(), torch.zeros(()))
        with torch.random.fork_rng(devices=[]):  # whatever was drawn before, and nothing is drawn for others
            torch.default_generator.manual_seed(zlib.crc32(f"{self.seed} {block.name}".encode()))
            lite = Lite(self, block.in_shapes[0][1], block.out_shape[1], stride_of(block))
        module.add_module(LITE, lite.to(like.device, like.dtype).train(module.training))
        module.forward = types.MethodType(_with_lite, module)

        def restore() -> None:
            delattr(module, LITE)
            del module.__dict__["forward"]
        return restore

    def last_blocks(self, graph: Graph, count: int | None) -> Plan:
        """Branches in the last `count` blocks (None: in all), biases from the first of them on, and the head.

        A branch gets a smaller kernel, reduction or fewer groups where its maps or channels ask for it.
        Raises PlanError where there are fewer blocks.
        """
        found = blocks(graph)
        if not found or not 1 <= (len(found) if count is None else count) <= len(found):
            wanted = "blocks" if count is None else f"the last {count} blocks"
            raise PlanError(f"{wanted} are asked for, but the network has {len(found)}: ask for as many as it has, or "
                            "for convolutions by another method")
        chosen = found if count is None else found[-count:]
        layers = {block.name: (self._fitted(block),) for block in chosen} if self.residuals else {}
        learns = {layer: roles for block in chosen if self.residuals for layer, roles in self._branch(block.name)}
        first = 0 if count is None else graph.calls.index(calls_of(graph, chosen[0].name)[0])
        for place, call in enumerate(graph.calls):
            wanted_roles = ("weight", "bias") if call.kind == "linear" else \
                ("bias",) if self.biases and place >= first and call.kind in ("conv", "norm") else ()
            if roles := tuple(role for role in wanted_roles if role in call.params):
                learns[call.name] = roles
        return Plan(input_shape=graph.input_shape, layers=layers, learns=learns)

    def _branch(self, block: str) -> Sequence[tuple[str, tuple[str, ...]]]:
        """What learns of a block's branch. Where biases do, the last shift would do what the block's own does."""
        last = ("weight",) if self.biases else ("weight", "bias")
        roles = {"conv1": ("weight",), "norm1": ("weight", "bias"), "conv2": ("weight",), "norm2": last}
        return [(qualified(f"{block}.{LITE}", layer), names) for layer, names in roles.items()]

    def _fitted(self, block: Call) -> TinyTL:
        size = min(block.in_shapes[0][2:])
        reduction = min(self.reduction, size)
        seen = size // reduction
        kernel = min(self.kernel_size, seen if seen % 2 else seen - 1)
        return self.model_copy(update={"groups": math.gcd(self.groups, block.in_shapes[0][1]), "reduction": reduction,
                                       "kernel_size": kernel})
