"""Sparse update: a window of a convolution's input channels learns, and only its inputs are kept.

What it does
    A plan says which biases learn, of which layers the weight learns, and of how many input channels. The learning
    channels form one window, so that the trained part of the weight is a view of it: a small parameter of its own
    (`weight_slice`), beside the frozen weight and in its memory. Optimizer, momentum and weight decay see the small
    one; the whole weight follows without a copy, and stays what `state_dict` saves. Which window learns hardly
    matters; `place_windows` takes the one whose weights have the largest norm. `released_plan` gives the schemes
    that the authors published for their networks.

Shapes
    x (n c h w), weight (o i u v), gy (n o h' w'); k channels learn from channel f on:
    weight_slice is weight[:, f:f+k] (o k u v), kept x[:, f:f+k] (n k h w)
    depthwise: k output channels learn, weight[f:f+k] (k 1 u v); kept are the channels that they read

What is kept (bytes)
    4 n k h w, and 4 o k u v of gradient. A layer of which only the bias learns, or through which the gradient only
    passes, keeps nothing without this method, and is refused.

What changes in the gradient or the answer
    Nothing of what is computed: gx is exact, and the gradient of the window is that part of the exact one. The
    rest of the weight does not learn.

When not to use
    Grouped convolutions that are not depthwise are refused: channels of several groups are no one window. Where
    memory allows all channels of all layers, there is nothing to choose.

Reference
    Lin, Zhu, Chen, Wang, Gan and Han, "On-Device Training Under 256KB Memory", NeurIPS 2022, section 3.2. There the
    trained channels are those of largest norm wherever they lie; a window serves as well and needs no gather.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import nn

from edgetune.contract import LayerMethod, Needs, Rule, Segment, Tensors
from edgetune.graph import Call, Graph
from edgetune.hosts.conv import ConvRule
from edgetune.methods.backward.exact import Exact
from edgetune.overlap import ConvGeometry

SLICE = "weight_slice"


def window(weight: torch.Tensor, channels: int, axis: int) -> int:
    """Where the window of `channels` channels along `axis` of weight (o i u v) with the largest L2 norm begins."""
    others = [a for a in range(weight.dim()) if a != axis]
    energy = weight.detach().double().square().sum(others)
    return int(energy.unfold(0, channels, 1).sum(1).argmax())


def read_channels(geometry: ConvGeometry, first: int, count: int) -> tuple[int, int]:
    """From which input channel up to which (exclusive) the learning part of the weight reads."""
    if not geometry.depthwise:
        return first, first + count
    multiplier = geometry.out_channels // geometry.groups
    return first // multiplier, -(-(first + count) // multiplier)


def window_gradient(kept: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry, first: int,
                    count: int) -> torch.Tensor:
    """The exact gradient of the window from its own input channels: (o k u v), depthwise (k 1 u v)."""
    start, stop = read_channels(geometry, first, count)
    if not geometry.depthwise:
        return Exact().grad_weight(kept, g, geometry.model_copy(update={"in_channels": count}))
    multiplier, width = geometry.out_channels // geometry.groups, stop - start
    part = geometry.model_copy(update={"in_channels": width, "groups": width, "out_channels": multiplier * width})
    gw = Exact().grad_weight(kept, g[:, multiplier * start:multiplier * stop], part)
    return gw[first - multiplier * start:first - multiplier * start + count]


class SparseUpdate(LayerMethod):
    """A window of learning channels: of the input, or of the output where the convolution is depthwise."""

    method = "sparse_update"
    learns_as = {"weight": SLICE}

    ratio: float = Field(0.25, gt=0, le=1, description="share of the channels that learn, at least one")
    channels: int | None = Field(None, ge=1, description="how many channels learn; goes before `ratio`")
    first: int = Field(0, ge=0, description="the channel that the window begins with")

    @property
    def label(self) -> str:
        return "sparse, " + (f"{100 * self.ratio:.3g} %" if self.channels is None else f"{self.channels} channels")

    def count(self, geometry: ConvGeometry) -> int:
        """How many channels learn."""
        return self.channels or max(1, round(self.ratio * window_axis(geometry)[1]))

    def part(self, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return weight.narrow(window_axis(geometry)[0], self.first, self.count(geometry))

    def placed(self, worth: torch.Tensor, geometry: ConvGeometry) -> SparseUpdate:
        axis, total = window_axis(geometry)
        if self.count(geometry) > total:
            return self  # as it is: `refuse` says why
        return self.model_copy(update={"first": window(worth, self.count(geometry), axis)})

    def exact_on(self, graph: Graph) -> bool:
        return True

    def refuse(self, call: Call) -> str | None:
        if call.kind != "conv" or call.geometry is None:
            return f"is a {call.kind} layer, not a convolution: leave it exact"
        geometry = call.geometry
        if geometry.groups > 1 and not geometry.depthwise:
            return (f"has groups={geometry.groups}, and channels of several groups are no one window of its weight: "
                    "leave it exact, or let only its bias learn")
        end, total = self.first + self.count(geometry), window_axis(geometry)[1]
        return None if end <= total else (f"has {total} channels to choose from, fewer than the {end} at which the "
                                          "window would end: make `first` or the count of channels smaller")

    def prepare(self, module: nn.Module, call: Call) -> Callable[[], None]:
        geometry = call.geometry
        assert geometry is not None and isinstance(module.weight, nn.Parameter)
        module.register_parameter(SLICE, nn.Parameter(self.part(module.weight.detach(), geometry)))

        def save(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            state.pop(prefix + SLICE, None)

        def load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
            whole = state.get(prefix + "weight", module.weight)
            if whole.shape == module.weight.shape:  # otherwise torch says what is wrong with the weight
                state[prefix + SLICE] = self.part(whole.detach(), geometry)

        hooks = (module.register_state_dict_post_hook(save), module.register_load_state_dict_pre_hook(load))

        def restore() -> None:
            for hook in hooks:
                hook.remove()
            delattr(module, SLICE)
        return restore

    def rule(self, call: Call) -> Rule | None:
        # where only the gradient passes there is no slice
        return WindowRule(self) if SLICE in call.params else None

    def save(self, x: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        start, stop = read_channels(geometry, self.first, self.count(geometry))
        # a view would keep all channels alive
        return x if stop - start == geometry.in_channels else x[:, start:stop].clone()

    def grad_input(self, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return Exact().grad_input(g, weight, geometry)

    def grad_weight(self, kept: torch.Tensor, g: torch.Tensor, geometry: ConvGeometry) -> torch.Tensor:
        return window_gradient(kept, g, geometry, self.first, self.count(geometry))


def window_axis(geometry: ConvGeometry) -> tuple[int, int]:
    """Along which axis of the weight (o i u v) the window lies, and how many channels there are."""
    return (0, geometry.out_channels) if geometry.depthwise else (1, geometry.in_channels)


@dataclass(frozen=True)
class WindowRule(ConvRule):
    """The convolution's host, which also sees to it that the slice lies in the weight's memory.

    Copying or moving a model (deepcopy, `to`, assigning a state dict) gives each parameter memory of its own; what
    the weight holds is then what counts.
    """

    method: SparseUpdate

    def forward(self, segment: Segment, xs: Any, params: Tensors, needs: Needs) -> Any:
        call = segment.calls[0]
        assert call.geometry is not None
        small, weight = params[call.params[SLICE]], params[call.params["weight"]]
        part = self.method.part(weight.detach(), call.geometry)
        if small.data_ptr() != part.data_ptr() or small.stride() != part.stride():
            small.data = part
        return super().forward(segment, xs, params, needs)
