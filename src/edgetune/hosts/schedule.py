"""How a chain keeps its activations, decided once from its calls.

Walking the run backward shows how each gradient arrives: constant on which cells, masked by bits or not. An
activation whose gradient arrives constant and is projected at once keeps its open counts a patch; others keep bits.
A norm whose scale learns keeps its normalised input by the same walk: for each way in which the gradient arrives, the
means over its cells under its masks; or all of it where that is no less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from edgetune.graph import Call
from edgetune.hosts.grid import PIXEL, Cell, refines
from edgetune.overlap import ConvGeometry
from edgetune.recognise import MASKS

Masks = tuple[str, ...]
"""Activations whose bits mask a gradient, the last one first."""

Flow = tuple[Cell, Masks]
"""How a gradient arrives: the cells it is constant on, and what masks it."""


class ConvSettings(Protocol):
    """What the host needs to know of a convolution's method."""

    @property
    def patch_px(self) -> int: ...
    @property
    def taps(self) -> Any: ...


class GridProducts(Protocol):
    """The two products of a convolution's backward pass on the grid; x None: the weight is frozen."""

    def input_cell(self, geometry: ConvGeometry, patch_px: int, taps: Any) -> Cell: ...
    def gradients(self, x: torch.Tensor | None, g: torch.Tensor, weight: torch.Tensor, geometry: ConvGeometry,
                  patch_px: int, taps: Any, wants_input: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]: ...


@dataclass(frozen=True)
class Moment:
    """How the scale of `norm` learns: from the gradient at the output of `reader`, the norm itself or the counted
    activation behind it. `cells`: for each way in which it arrives there, the cells it is constant on; empty where the
    norm's input is kept whole."""

    norm: Call
    reader: Call
    cells: Mapping[Masks, Cell]

    @property
    def weight(self) -> str:
        """The scale's qualified name."""
        return self.norm.params["weight"]


@dataclass(frozen=True)
class Schedule:
    """`cells`: where a value's gradient is projected; `counted`: activations and gates kept on these cells;
    `moments`: how each norm's scale learns, if it does, and `read` the same by reader; `refused`: calls that cannot be
    part of the run."""

    cells: Mapping[str, Cell]
    counted: Mapping[str, Cell]
    moments: Mapping[str, Moment]
    read: Mapping[str, Moment]
    refused: frozenset[str]


def schedule(run: tuple[Call, ...], settings: Mapping[str, ConvSettings], grid: GridProducts) -> Schedule:
    """Walk the run backward once and decide what each call keeps."""
    inside = {call.node: call for call in run}
    cells = _projection_cells(inside, settings)
    flows: dict[str, list[Flow]] = {call.node: [(PIXEL, ())] for call in run
                                    if any(reader not in inside for reader in call.consumers)}
    counted: dict[str, Cell] = {}
    moments: dict[str, Moment] = {}
    refused: set[str] = set()
    for call in reversed(run):
        arriving = flows.get(call.node, [])
        if call.kind in ("activation", "scale") and (cell := _counting_cell(call, arriving, cells)) is not None:
            counted[call.node] = cell
        elif call.kind == "scale" or (call.kind == "activation" and call.function not in MASKS):
            refused.add(call.node)
        elif call.kind == "norm" and "weight" in call.params:
            moments[call.node] = _moment(call, _sole_reader(call, inside), flows, counted)
        for node, flow in zip(call.inputs, _leaving(call, arriving, cells, counted, settings, grid), strict=True):
            flows.setdefault(node, []).extend(flow)
    return Schedule(cells, counted, moments, {m.reader.node: m for m in moments.values()}, frozenset(refused))


def _counting_cell(call: Call, arriving: list[Flow], cells: Mapping[str, Cell]) -> Cell | None:
    """The cells on which an activation's open counts, or a gate's means, are all that backward needs; else None."""
    if any(masks or cell == PIXEL for cell, masks in arriving):
        return None
    if call.kind == "scale":
        return arriving[0][0] if len(set(arriving)) == 1 else None
    cell = cells.get(call.inputs[0])
    if cell is None or not all(refines(_map_size(call), coarse, cell) for coarse, _ in arriving):
        return None
    # one byte a patch against one bit a value: whichever is smaller
    return cell if call.function not in MASKS or cell[0] * cell[1] >= 8 else None


def _leaving(call: Call, arriving: list[Flow], cells: Mapping[str, Cell], counted: Mapping[str, Cell],
             settings: Mapping[str, ConvSettings], grid: GridProducts) -> list[list[Flow]]:
    """How the gradient goes on to each input."""
    if call.kind == "conv":
        assert call.geometry is not None
        own = settings[call.node]
        return [[(grid.input_cell(call.geometry, own.patch_px, own.taps), ())]]
    if call.kind == "norm" and call.inputs[0] in cells:
        return [[(cells[call.inputs[0]], ())]]
    if call.kind == "mean":
        return [[((call.in_shapes[0][2], call.in_shapes[0][3]), ())]]
    if call.kind == "activation":
        cell = counted.get(call.node)
        return [[(c, (*masks, call.node)) for c, masks in arriving] if cell is None else [(cell, ())]]
    return [arriving] * len(call.inputs)


def _moment(norm: Call, behind: Call | None, flows: Mapping[str, list[Flow]], counted: Mapping[str, Cell]) -> Moment:
    """What a norm keeps for its scale: means over cells for each mask that the gradient arrives under."""
    reader = behind if behind is not None and behind.kind == "activation" and behind.node in counted else norm
    size, arriving = _map_size(norm), flows.get(reader.node, [])
    cells = {masks: _common([cell for cell, own in arriving if own == masks], size) for _, masks in arriving}
    if PIXEL in cells.values() or sum(1 / (rows * columns) for rows, columns in cells.values()) >= 1:
        return Moment(norm, norm, {})
    return Moment(norm, reader, cells)


def _common(cells: list[Cell], size: tuple[int, int]) -> Cell:
    """The largest cell that divides all of `cells`; sides as long as the map count only where all are."""
    rows, columns = ([cell[axis] for cell in cells] for axis in (0, 1))
    return _common_side(rows, size[0]), _common_side(columns, size[1])


def _common_side(sides: list[int], size: int) -> int:
    shorter = [side for side in sides if side < size]
    return math.gcd(*shorter) if shorter else min(sides)


def _map_size(call: Call) -> tuple[int, int]:
    return (call.out_shape[2], call.out_shape[3]) if len(call.out_shape) == 4 else PIXEL


def _projection_cells(inside: Mapping[str, Call], settings: Mapping[str, ConvSettings]) -> dict[str, Cell]:
    """Values that go straight down to one convolution's output, with its patch: through nothing, or through a norm with
    an activation behind it. The norm's scale reads what comes out of that activation, before it is projected."""
    cells: dict[str, Cell] = {}
    for call in inside.values():
        reader = _sole_reader(call, inside)
        if reader is None:
            continue
        if call.kind == "conv":
            cells[call.node] = (settings[call.node].patch_px,) * 2
        elif call.inputs[0] in cells and (call.kind == "identity" or (
                call.kind == "norm" and reader.kind == "activation")):
            cells[call.node] = cells[call.inputs[0]]
    return cells


def _sole_reader(call: Call, inside: Mapping[str, Call]) -> Call | None:
    """The one call that reads a value, identities aside; None where several do, or one from outside."""
    while len(call.consumers) == 1 and call.consumers[0] in inside:
        call = inside[call.consumers[0]]
        if call.kind != "identity":
            return call
    return None
