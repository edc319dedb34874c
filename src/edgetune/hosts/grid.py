"""Gradients that live on a patch grid, and how they move between grids without becoming full maps.

A gradient of a map (n c h w) is a sum of terms: one value a cell, spread over the cell, and masked by packed bits
where activations could not be projected yet. A full map is a term with cells of one pixel. Everything is exact:
projecting takes the mean over each cell of what the terms stand for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from edgetune import kernels
from edgetune.overlap import cell_sizes, cells

Cell = tuple[int, int]
PIXEL: Cell = (1, 1)


@dataclass(frozen=True)
class Term:
    """value (n c p q) on cells of `cell` pixels; `bits` masks single pixels, in the memory order of a full map that
    lies channels `last` or not, and `masks` names the activations whose bits these are."""

    value: torch.Tensor
    cell: Cell
    bits: torch.Tensor | None = None
    last: bool = False
    masks: tuple[str, ...] = ()


@lru_cache(maxsize=1024)
def transfer(size: int, source: int, target: int) -> torch.Tensor:
    """R (b a): the mean over target cell b of a function constant on source cells a, along one axis; float64."""
    starts_a, starts_b = torch.arange(0, size, source), torch.arange(0, size, target)
    ends_a, ends_b = (starts_a + source).clamp(max=size), (starts_b + target).clamp(max=size)
    shared = torch.minimum(ends_a, ends_b[:, None]) - torch.maximum(starts_a, starts_b[:, None])
    return shared.clamp(min=0).double() / cell_sizes(size, target)[:, None]


@lru_cache(maxsize=1024)
def cell_area(hw: tuple[int, int], cell: Cell) -> torch.Tensor:
    """Pixels of each cell, (p q), float64."""
    return cell_sizes(hw[0], cell[0])[:, None] * cell_sizes(hw[1], cell[1])


def on(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A cached float64 table in the precision and on the device of x."""
    return table if table.dtype == x.dtype and table.device == x.device else _placed(table, x.dtype, str(x.device))


@lru_cache(maxsize=4096)
def _placed(table: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    return table.to(device=device, dtype=dtype)


def refines(hw: tuple[int, int], coarse: Cell, fine: Cell) -> bool:
    """Whether every fine cell lies inside one coarse cell."""
    return all(c % f == 0 or c >= size for size, c, f in zip(hw, coarse, fine, strict=True))


def regrid(value: torch.Tensor, hw: tuple[int, int], source: Cell, target: Cell) -> torch.Tensor:
    """(n c p q) on source cells -> the means over target cells. Exact for any pair of grids."""
    if all(cells(size, s) == cells(size, t) and (s == t or s >= size <= t)
           for size, s, t in zip(hw, source, target, strict=True)):
        return value
    if source == PIXEL:
        return kernels.patch_mean(value, *target)
    copied = [s % t == 0 or s >= size for size, s, t in zip(hw, source, target, strict=True)]
    if any(copied):
        # every cell's value to the target cells inside it, which on the grid is what spreading does on a map
        grid = [cells(size, t) if own else count for own, size, t, count in
                zip(copied, hw, target, value.shape[2:], strict=True)]
        times = [(s // t if s % t == 0 else count) if own else 1 for own, s, t, count in
                 zip(copied, source, target, grid, strict=True)]
        value = kernels.patch_spread(value, grid[0], grid[1], times[0], times[1])
    for axis, own, size, s, t in zip((2, 3), copied, hw, source, target, strict=True):
        if not own:
            rows = on(transfer(size, s, t), value)
            value = rows @ value if axis == 2 else value @ rows.T
    return value


def project(terms: list[Term], hw: tuple[int, int], cell: Cell) -> torch.Tensor | None:
    """The means over cells of what the terms stand for, (n c p q); None when there are no terms."""
    total: torch.Tensor | None = None
    for term in terms:
        part = _project_one(term, hw, cell)
        total = part if total is None else total + part
    return total


def _project_one(term: Term, hw: tuple[int, int], cell: Cell) -> torch.Tensor:
    if term.bits is None:
        return regrid(term.value, hw, term.cell, cell)
    n, c = term.value.shape[:2]
    if term.cell != PIXEL and refines(hw, term.cell, cell):
        counts = kernels.bits_count(term.bits, n, c, *hw, *cell, term.last)
        share = counts.to(term.value.dtype) / on(cell_area(hw, cell), term.value)
        return regrid(term.value, hw, term.cell, cell) * share
    return kernels.masked_patch_mean(spread_value(term.value, hw, term.cell, term.last), term.bits, *cell)


def channel_sums(means: torch.Tensor, hw: tuple[int, int], cell: Cell) -> torch.Tensor:
    """(n c p q) -> (c): sums over samples and pixels of what the means over cells stand for."""
    return (means.sum(0) * on(cell_area(hw, cell), means)).sum((1, 2))


def order(last: bool) -> torch.memory_format:
    """The memory order of a full map."""
    return torch.channels_last if last else torch.contiguous_format


def spread_value(value: torch.Tensor, hw: tuple[int, int], cell: Cell, last: bool = False) -> torch.Tensor:
    """(n c p q) -> (n c h w): every pixel takes its cell's value; the map lies channels `last` or not."""
    if cell == PIXEL:
        return value.contiguous(memory_format=order(last))
    return kernels.patch_spread(value, *hw, *cell, last)


def spread(terms: list[Term], hw: tuple[int, int], last: bool = False) -> torch.Tensor | None:
    """The full map (n c h w) that the terms stand for; None when there are no terms."""
    total: torch.Tensor | None = None
    for term in terms:
        part = spread_value(term.value, hw, term.cell, last if term.bits is None else term.last)
        if term.bits is not None:
            part = kernels.mask_apply(part, term.bits)
        total = part if total is None else total + part
    return total


def merge(terms: list[Term]) -> list[Term]:
    """Add up the terms that share a grid and a mask."""
    merged: dict[tuple[Cell, tuple[str, ...]], Term] = {}
    for term in terms:
        key = (term.cell, term.masks)
        known = merged.get(key)
        merged[key] = term if known is None else replace(known, value=known.value + term.value)
    return list(merged.values())


def mask(terms: list[Term], bits: torch.Tensor, name: str, last: bool = False) -> list[Term]:
    """Every term behind one more mask: masks along a run multiply, so their bits, all in one order, are AND-ed."""
    return [Term(t.value, t.cell, bits if t.bits is None else t.bits & bits, last, (*t.masks, name)) for t in terms]


def scale(terms: list[Term], factor: torch.Tensor) -> list[Term]:
    """Every term times `factor`, broadcastable against (n c 1 1)."""
    return [replace(t, value=t.value * factor.to(t.value.dtype)) for t in terms]
