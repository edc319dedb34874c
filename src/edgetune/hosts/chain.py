"""The chain host: a run of calls forward on full maps, backward on the patch grid.

Each kind of call has one function forward and one backward; what an activation keeps is the schedule's decision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from edgetune import kernels
from edgetune.contract import Needs, Segment, Tensors
from edgetune.graph import Call
from edgetune.hosts.conv import convolve
from edgetune.hosts.cursor import working_on
from edgetune.hosts.grid import (
    PIXEL,
    Term,
    cell_area,
    channel_sums,
    mask,
    merge,
    on,
    order,
    project,
    scale,
    spread,
)
from edgetune.hosts.moments import keep_masked, keep_moment, learn_moment
from edgetune.hosts.pointwise import activate, norm_scale, normalise, per_channel, slope
from edgetune.hosts.schedule import ConvSettings, GridProducts, Moment, Schedule
from edgetune.hosts.values import live_values, map_sizes, owned_values
from edgetune.recognise import MASKS


@dataclass
class _Pass:
    """One forward or backward pass: what the steps read and write.

    `last`: maps lie channels last, and bits in that order; `owned`: values that the next call may overwrite; `held`:
    inputs of norms that wait for bits.
    """

    params: Tensors
    needs: Needs
    live: frozenset[str]
    last: bool = False
    owned: frozenset[str] = frozenset()
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    grads: dict[str, torch.Tensor] = field(default_factory=dict)
    held: dict[str, tuple[Moment, torch.Tensor]] = field(default_factory=dict)

    def add_grad(self, name: str, grad: torch.Tensor) -> None:
        """A parameter used twice gets the sum."""
        known = self.grads.get(name)
        self.grads[name] = grad if known is None else known + grad


@dataclass(frozen=True)
class ChainRule:
    """Forward call by call on full maps; backward on the grid, by the schedule."""

    schedule: Schedule
    settings: Mapping[str, ConvSettings]
    grid: GridProducts

    def forward(self, segment: Segment, xs: Sequence[torch.Tensor], params: Tensors,
                needs: Needs) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        last = kernels.is_channels_last(xs[0])
        state = _Pass(params, needs, live_values(segment, needs), last, owned_values(segment))
        state.kept["last"] = xs[0].new_empty((int(last), 0))
        values = dict(zip(segment.inputs, xs, strict=True))
        last_use = {node: call.node for call in segment.calls for node in call.inputs}
        for x, node in zip(xs, segment.inputs, strict=True):
            state.kept[f"size:{node}"] = x.new_empty((*x.shape[2:], 0))
        for call in segment.calls:
            given = [values[node] for node in call.inputs]
            working_on(call)
            values[call.node] = _FORWARD[call.kind](self, call, given, state)
            for node in call.inputs:
                if last_use[node] == call.node and node not in segment.outputs:
                    values.pop(node, None)
        return tuple(values[node] for node in segment.outputs), state.kept

    def backward(self, segment: Segment, kept: Tensors, gys: Sequence[torch.Tensor | None], params: Tensors,
                 needs: Needs) -> tuple[tuple[torch.Tensor | None, ...], dict[str, torch.Tensor]]:
        last = bool(kept["last"].shape[0])
        state = _Pass(params, needs, live_values(segment, needs), last, kept=dict(kept))
        sizes = map_sizes(segment, kept)
        flows: dict[str, list[Term]] = {}
        for node, gy in zip(segment.outputs, gys, strict=True):
            if gy is not None:
                flows[node] = [Term(gy if gy.dim() == 4 else gy[:, :, None, None], PIXEL)]
        for call in reversed(segment.calls):
            terms = merge(flows.pop(call.node, []))
            if not terms or call.node not in state.live:
                continue
            working_on(call)
            leaving = _BACKWARD[call.kind](self, call, terms, sizes, state)
            for node, flow in zip(call.inputs, leaving, strict=True):
                if node in state.live:
                    flows.setdefault(node, []).extend(flow)
        gxs = tuple(spread(merge(flows.get(node, [])), sizes[node], last) if wanted else None
                    for node, wanted in zip(segment.inputs, needs.inputs, strict=True))
        return gxs, state.grads


def _conv(rule: ChainRule, call: Call, given: list[torch.Tensor], state: _Pass) -> torch.Tensor:
    assert call.geometry is not None
    x = given[0]
    geometry = call.geometry.at(int(x.shape[2]), int(x.shape[3]))
    weight, bias = state.params[call.params["weight"]], state.params.get(call.params.get("bias", ""))
    y = convolve(x, weight, bias, geometry)
    if call.params["weight"] in state.needs.params:
        own = rule.settings[call.node]
        cell = rule.grid.input_cell(geometry, own.patch_px, own.taps)
        key = f"mean:{call.inputs[0]}:{cell[0]}x{cell[1]}"
        if key not in state.kept:
            state.kept[key] = kernels.patch_mean(x.to(y.dtype), *cell, by_channel=True)
    return y


def _conv_back(rule: ChainRule, call: Call, terms: list[Term], sizes: Mapping[str, tuple[int, int]],
               state: _Pass) -> list[list[Term]]:
    assert call.geometry is not None
    geometry, own = call.geometry.at(*sizes[call.inputs[0]]), rule.settings[call.node]
    hw, cell = geometry.out_hw, (own.patch_px, own.patch_px)
    g = project(terms, hw, cell)
    assert g is not None
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    name, bias = call.params["weight"], call.params.get("bias", "")
    weight = state.params[name]
    if bias in state.needs.params:
        state.add_grad(bias, channel_sums(g, hw, cell).to(weight.dtype))
    cell_in = rule.grid.input_cell(geometry, own.patch_px, own.taps)
    key = f"mean:{call.inputs[0]}:{cell_in[0]}x{cell_in[1]}"
    x = state.kept[key] if name in state.needs.params else None
    gx, gw = rule.grid.gradients(x, g, weight, geometry, own.patch_px, own.taps, call.inputs[0] in state.live)
    if gw is not None:
        state.add_grad(name, gw.to(weight.dtype))
    return [[] if gx is None else [Term(gx, cell_in)]]


def _norm(rule: ChainRule, call: Call, given: list[torch.Tensor], state: _Pass) -> torch.Tensor:
    y = normalise(call, given[0], state.params)
    if call.params.get("weight", "") in state.needs.params:
        moment = rule.schedule.moments[call.node]
        if keep_moment(moment, given[0], y, state.params, state.kept):
            state.held[call.node] = (moment, given[0])
    return y


def _learn_scale(rule: ChainRule, call: Call, terms: list[Term], hw: tuple[int, int], state: _Pass) -> None:
    """The gradient of a norm's scale, if the schedule reads it at this call's output."""
    moment = rule.schedule.read.get(call.node)
    if moment is not None and moment.weight in state.needs.params:
        grad = learn_moment(moment, state.kept, terms, hw, state.last, state.params)
        state.add_grad(moment.weight, grad.to(state.params[moment.weight].dtype))


def _norm_back(rule: ChainRule, call: Call, terms: list[Term], sizes: Mapping[str, tuple[int, int]],
               state: _Pass) -> list[list[Term]]:
    hw, bias = sizes[call.node], call.params.get("bias", "")
    _learn_scale(rule, call, terms, hw, state)
    cell = rule.schedule.cells.get(call.inputs[0])
    if cell is not None:
        value = project(terms, hw, cell)
        assert value is not None
        terms = [Term(value, cell)]
    if bias in state.needs.params:
        at = cell or terms[0].cell
        value = project(terms, hw, at)
        assert value is not None
        state.add_grad(bias, channel_sums(value.to(state.params[bias].dtype), hw, at))
    return [scale(terms, per_channel(norm_scale(call, state.params)))]


def _activation(rule: ChainRule, call: Call, given: list[torch.Tensor], state: _Pass) -> torch.Tensor:
    x = given[0]
    y = activate(call.function, x, in_place=call.inputs[0] in state.owned)
    if call.inputs[0] not in state.live:
        return y
    cell = rule.schedule.counted.get(call.node)
    if cell is None:
        y_ordered = y.contiguous(memory_format=order(state.last))
        state.kept[f"bits:{call.node}"] = kernels.mask_pack(y_ordered, *MASKS[call.function])
        keep_masked(state.held, state.params, state.kept, state.last)
    elif call.function in MASKS:
        state.kept[f"count:{call.node}"] = kernels.mask_count(y, *MASKS[call.function], *cell)
    else:
        state.kept[f"slope:{call.node}"] = kernels.patch_mean(slope(call.function, x), *cell)
    return y


def _activation_back(rule: ChainRule, call: Call, terms: list[Term], sizes: Mapping[str, tuple[int, int]],
                     state: _Pass) -> list[list[Term]]:
    cell, hw = rule.schedule.counted.get(call.node), sizes[call.node]
    _learn_scale(rule, call, terms, hw, state)
    if cell is None:
        return [mask(terms, state.kept[f"bits:{call.node}"], call.node, state.last)]
    g = project(terms, hw, cell)
    assert g is not None
    if call.function in MASKS:
        share = state.kept[f"count:{call.node}"].to(g.dtype) / on(cell_area(hw, cell), g)
    else:
        share = state.kept[f"slope:{call.node}"].to(g.dtype)
    return [[Term(g * share, cell)]]


def _add(rule: ChainRule, call: Call, given: list[torch.Tensor], state: _Pass) -> torch.Tensor:
    if len(call.inputs) == 2 and given[0].dtype == given[1].dtype:
        for mine, other in ((0, 1), (1, 0)):
            if call.inputs[mine] in state.owned:
                return given[mine].add_(given[other])
    return given[0] + given[-1]


def _add_back(rule: ChainRule, call: Call, terms: list[Term], sizes: Mapping[str, tuple[int, int]],
              state: _Pass) -> list[list[Term]]:
    return [terms] * len(call.inputs) if len(call.inputs) == 2 else [scale(terms, 2 * torch.ones(()))]


def _mean(rule: ChainRule, call: Call, given: list[torch.Tensor], state: _Pass) -> torch.Tensor:
    if call.function == "adaptive_avg_pool2d":
        return torch.nn.functional.adaptive_avg_pool2d(given[0], 1)
    return given[0].mean((2, 3), keepdim=bool(call.attributes["keepdim"]))


def _mean_back(rule: ChainRule, call: Call, terms: list[Term], sizes: Mapping[str, tuple[int, int]],
               state: _Pass) -> list[list[Term]]:
    hw = sizes[call.inputs[0]]
    value = project(terms, PIXEL, PIXEL)
    assert value is not None
    return [[Term(value / (hw[0] * hw[1]), hw)]]


def _scale(rule: ChainRule, call: Call, given: list[torch.Tensor], state: _Pass) -> torch.Tensor:
    x, gate = sorted(given, key=lambda value: value.shape[2:] == (1, 1))
    if call.node in state.live:
        state.kept[f"mean:{call.node}"] = kernels.patch_mean(x, *rule.schedule.counted[call.node])
        state.kept[f"gate:{call.node}"] = gate
    return given[0] * given[1]


def _scale_back(rule: ChainRule, call: Call, terms: list[Term], sizes: Mapping[str, tuple[int, int]],
                state: _Pass) -> list[list[Term]]:
    hw, cell = sizes[call.node], rule.schedule.counted[call.node]
    g = project(terms, hw, cell)
    assert g is not None
    x = state.kept[f"mean:{call.node}"].to(g.dtype)
    to_gate = (g * x * on(cell_area(hw, cell), g)).sum((2, 3), keepdim=True)
    to_map = scale(terms, state.kept[f"gate:{call.node}"])
    both = ([Term(to_gate, PIXEL)], to_map)
    return list(both) if sizes[call.inputs[0]] == PIXEL else list(reversed(both))


def _identity(rule: ChainRule, call: Call, given: list[torch.Tensor], state: _Pass) -> torch.Tensor:
    return given[0]


def _identity_back(rule: ChainRule, call: Call, terms: list[Term], sizes: Mapping[str, tuple[int, int]],
                   state: _Pass) -> list[list[Term]]:
    return [terms]


_FORWARD = {"conv": _conv, "norm": _norm, "activation": _activation, "add": _add, "mean": _mean,
            "scale": _scale, "identity": _identity}
_BACKWARD = {"conv": _conv_back, "norm": _norm_back, "activation": _activation_back, "add": _add_back,
             "mean": _mean_back, "scale": _scale_back, "identity": _identity_back}
