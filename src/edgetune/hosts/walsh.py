"""Walsh-Hadamard functions on the patches of a map: how a map becomes a few coefficients a patch, and comes back.

Products of one function an axis, in order of sequency: the patch mean, then left against right, top against bottom ...
Two functions an axis span exactly what patches of half the size span.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from edgetune.hosts.grid import Cell, on
from edgetune.overlap import cell_sizes, cells


def analyse(x: torch.Tensor, cell: Cell, bases: int) -> torch.Tensor:
    """x (n c h w) -> coefficients (n c b p q): the mean over each cell of x times each basis function."""
    rows, columns = (on(_walsh(size, c, bases), x) for size, c in zip(x.shape[2:], cell, strict=True))
    wide = torch.einsum("nchw,jqw->nchjq", x, columns)
    both = torch.einsum("nchjq,iph->ncijpq", wide, rows)
    return torch.stack([both[:, :, i, j] for i, j in _pairs(bases)], 2)


def fold_bases(coefficients: torch.Tensor) -> torch.Tensor:
    """(n c b p q) -> (nb c p q): bases are orthogonal, so they enter every product as further samples."""
    n, c, b, p, q = coefficients.shape
    return coefficients.transpose(1, 2).reshape(n * b, c, p, q)


def synthesise(coefficients: torch.Tensor, hw: tuple[int, int], cell: Cell) -> torch.Tensor:
    """(n c b p q) -> (n c h w): the sum of the basis functions with these coefficients."""
    bases = coefficients.shape[2]
    # analysis divides by the cell's size, so that synthesis is its transpose times that size
    rows, columns = (on(_walsh(size, c, bases), coefficients) * on(cell_sizes(size, c), coefficients)[:, None]
                     for size, c in zip(hw, cell, strict=True))
    total = coefficients.new_zeros((*coefficients.shape[:2], *hw))
    for index, (i, j) in enumerate(_pairs(bases)):
        total = total + rows[i].T @ coefficients[:, :, index] @ columns[j]
    return total


@lru_cache(maxsize=64)
def _pairs(bases: int) -> tuple[tuple[int, int], ...]:
    """The first products of Walsh functions (row, column), squares completed: 4 are 2 x 2, 9 are 3 x 3."""
    ordered = sorted(((i, j) for i in range(bases) for j in range(bases)), key=lambda ij: (max(ij), sum(ij), ij))
    return tuple(ordered[:bases])


@lru_cache(maxsize=256)
def _walsh(size: int, cell: int, bases: int) -> torch.Tensor:
    """Analysis table (k p h) of one axis: means over each cell of its k-th Walsh function, orthogonalised.

    The functions of a cell have mean square 1, so that the coefficients' products add up like patch means.
    """
    count = max(max(pair) for pair in _pairs(bases)) + 1
    table = torch.zeros(count, cells(size, cell), size, dtype=torch.float64)
    for p, start in enumerate(range(0, size, cell)):
        end = min(start + cell, size)
        table[:, p, start:end] = _walsh_cell(end - start, count) / (end - start)
    return table


@lru_cache(maxsize=256)
def _walsh_cell(length: int, count: int) -> torch.Tensor:
    """The first `count` Walsh functions in sequency order on `length` samples; those that do not fit are zero."""
    order = 1 << max(count - 1, 1).bit_length()
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < order:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    changes = (hadamard[:, 1:] != hadamard[:, :-1]).sum(1)
    walsh = hadamard[changes.argsort()][:count]
    sampled = walsh[:, (torch.arange(length, dtype=torch.float64).add(0.5) * order / length).long()]
    functions = torch.zeros(count, length, dtype=torch.float64)
    for k in range(count):
        rest = sampled[k] - sum((functions[m] * (sampled[k] @ functions[m]) / length for m in range(k)),
                                torch.zeros(length, dtype=torch.float64))
        energy = (rest @ rest) / length
        if energy > 1e-9:
            functions[k] = rest / energy.sqrt()
    return functions
