"""`edgetune bench transfer`: what adapting a pretrained network costs in accuracy, method by method.

MobileNetV2 from ImageNet on flowers5 (five folds over all photos), and ResNet-20 on a drifted CIFAR-10 (three
seeds). Within a fold every method starts from the same weights and sees the same batches. The learning rate
is chosen on plain back-propagation, on a part held out of the first fold's training photos, for every method.

"plain" is stock autograd with norms in eval: weights, norm scales and norm shifts learn. Filtered rows learn
weights and shifts, and those "with scales" the scales too; "plain, shifts only" tells what the scales alone are worth.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edgetune.bench.adapt import adapt
from edgetune.bench.arms import Arm, chain, last, planned, stock
from edgetune.bench.cases import IMAGENET_V2, RESNET20, Case
from edgetune.bench.grid import Grid, GridOptions
from edgetune.bench.published import PublishedFilter
from edgetune.contract import Plan
from edgetune.graph import Graph
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.gradient_filter import GradientFilter
from edgetune.methods.backward.pooled_chain import PooledChain


class Options(GridOptions):
    """What to run, and where cells are stored."""

    out: str = "bench/results/transfer.jsonl"


def with_bases(patch_px: int, bases: int) -> Arm:
    """Layer by layer, with the first Walsh functions of each patch."""
    method = GradientFilter(patch_px=patch_px, bases=bases)
    return Arm(f"filter, {bases} bases", planned(last(None, method)), patch_px, "mean")


def published(patch_px: int) -> Arm:
    """The operator as published."""
    return Arm("published operator", planned(last(None, PublishedFilter(patch_px=patch_px))), patch_px, "mean")


def exact_tail(patch_px: int, first_exact: int, scales: bool = False) -> Arm:
    """The pooled chain in front, exact gradients from block `first_exact` of `features` on.

    The last blocks have small maps, so that exactness costs few bytes there, and what they hand on is exact. With
    `scales` the norms of the exact blocks learn their scales too.
    """

    def plan(graph: Graph) -> Plan:
        filtered = last(None, PooledChain(patch_px=patch_px))(graph)
        tail = tuple(f"features.{block}." for block in range(first_exact, 19))
        layers = {name: ((Exact(),) if name.startswith(tail) else stack) for name, stack in filtered.layers.items()}
        norms = {call.name for call in graph.layers("norm") if scales and call.name.startswith(tail)}
        learns = {name: (("weight", "bias") if name in norms else roles) for name, roles in filtered.learns.items()}
        return filtered.model_copy(update={"layers": layers, "learns": learns})

    name = f"chain, exact from block {first_exact}" + (", with scales" if scales else "")
    return Arm(name, planned(plan), patch_px, "mean")


def twice(arm: Arm) -> Arm:
    """With two draws of head and order a fold: chance alone moves an arm of all layers by points."""
    return replace(arm, repeats=2)


PLAIN = Arm("plain", stock())
SHIFTS = Arm("plain, shifts only", stock(scales=False))
BEFORE = Arm("before", stock(), trains=False)

HEAD = Case("head only", IMAGENET_V2, 160, 5, 19, (0.02, 0.05, 0.1, 0.2))
LAST2 = Case("last 2 blocks", IMAGENET_V2, 160, 5, 17, (0.01, 0.02, 0.05))
LAST4 = Case("last 4 blocks", IMAGENET_V2, 160, 5, 15, (0.01, 0.02, 0.05))
ALL = Case("all layers", IMAGENET_V2, 96, 3, None, (0.01, 0.02))
CIFAR = Case("ResNet-20, all layers", RESNET20, 32, 3, None, (0.01, 0.02))

_LAST = (chain(4), chain(2, "grid"), SHIFTS, published(2), with_bases(4, 3), chain(4, "grid"), chain(7))
ROWS: tuple[tuple[Case, Arm], ...] = (
    (LAST4, PLAIN),
    (ALL, twice(PLAIN)),
    (LAST4, chain(2)),
    (ALL, twice(chain(2))),
    (HEAD, PLAIN),
    (ALL, chain(4)),
    (ALL, exact_tail(2, 7)),
    (ALL, twice(exact_tail(2, 7, scales=True))),
    *((CIFAR, arm) for arm in (BEFORE, PLAIN, chain(2))),
    *((LAST4, arm) for arm in _LAST[:4]),
    *((ALL, arm) for arm in (published(2), chain(2, "grid"), SHIFTS)),
    *((CIFAR, arm) for arm in (chain(2, "grid"), chain(4), published(2), SHIFTS)),
    *((case, chain(2, scales=True)) for case in (LAST4, ALL)),
    (ALL, exact_tail(2, 4, scales=True)),
    *((LAST4, arm) for arm in _LAST[4:]),
    *((case, chain(4, scales=True)) for case in (LAST4, ALL)),
    *((LAST2, arm) for arm in (PLAIN, chain(2), chain(4), chain(2, "grid"), published(2), chain(7))),
)
"""The default grid, the deciding rows first."""

GRID = Grid("transfer", (HEAD, LAST2, LAST4, ALL, CIFAR), ROWS, study=adapt, search=adapt)
summarise = GRID.summarise


def run(options: Options | None = None) -> dict[str, Any]:
    """Work through the cells that are not there yet, then summarise: {machine, versions, git, rows}."""
    return GRID.run(options or Options())
