"""`edgetune bench training`: the ways to train on a device side by side, on the same network, photos and seeds.

The digits network on drifted digits, all layers (three seeds); ResNet-20 on a drifted CIFAR-10, its last six
convolutions (three seeds); MobileNetV2 on flowers5, its last four blocks (five folds). The head learns everywhere.
Every arm is trained by SGD without momentum and without clipping, so that nothing but the network and its gradients
has to be held. Each has a learning rate of its own, chosen among some around where it learns at all, because blurred
gradients, a head alone and integers have each their own scale; "exact" and "MobileTL" take plain's, and the int8 state
that of the rounded floats. A rate counts by the worst of three seeds.

"plain" is stock autograd with norms in eval, all that the case lets learn: weights, norm scales and norm shifts.
"exact" and "pooled chain" learn weights and shifts, and those "with scales" the scales too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from edgetune.bench.adapt import adapt
from edgetune.bench.arms import Arm, chain, integers, last, planned, stock
from edgetune.bench.cases import Bench, Case, Recipe
from edgetune.bench.cells import Line
from edgetune.bench.costs import CLOCK, step_costs
from edgetune.bench.grid import PLAIN, Grid, GridOptions
from edgetune.bench.photos import Split
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.mobiletl import MobileTL, last_blocks
from edgetune.quantize import Stepped


class Options(GridOptions):
    """What to run, and where cells are stored."""

    out: str = "bench/results/training.jsonl"


RATES = (0.003, 0.01, 0.03, 0.1)
CHAIN_RATES = (0.003, 0.01, 0.03)
HEAD_RATES = (0.3, 1.0, 3.0, 10.0)
SCALED_RATES = (0.003, 0.01, 0.03)
UNSCALED_RATES = (0.3, 1.0, 3.0, 10.0)
"""Without quantization-aware scaling gradients of integers are small, by how much nobody knows beforehand."""
SEARCHED_SEEDS = 3
BARE = Recipe(momentum=0.0, clip=None, clock="cpu")

DIGITS = Case("digits_net@32 all", "digits_net", 32, 10, None, RATES, BARE)
CIFAR = Case("resnet20@32 last 6", "resnet20", 32, 3, None, RATES, BARE)
FLOWERS = Case("mobilenet_v2@96 last 4 blocks", "mobilenet_v2_tf", 96, 3, None, RATES, BARE)

BEFORE = Arm("before", stock(), trains=False)
HEAD = Arm("head only", stock(0), rates=HEAD_RATES)


def plain(count: int | None) -> Arm:
    """Stock autograd."""
    return Arm(PLAIN, stock(count))


def exact(count: int | None, scales: bool = False) -> Arm:
    """Exact gradients, with nothing kept that they do not read."""
    return Arm("exact" + ", with scales" * scales, planned(last(count, Exact(), scales)))


def chains(count: int | None) -> tuple[Arm, ...]:
    """The pooled chain with small and large patches, without scales and with."""
    return tuple(
        replace(chain(patch_px, scales=scales, count=count), rates=CHAIN_RATES)
        for scales in (False, True)
        for patch_px in (2, 4)
    )


def mobiletl(blocks: int) -> Arm:
    """Inverted residual blocks by MobileTL. Without hard-swish, as here, one bit and two bits are the same."""
    return Arm("MobileTL", planned(lambda graph: last_blocks(graph, blocks, MobileTL())))


def int8(count: int | None) -> tuple[Arm, ...]:
    """Integer networks: weights as rounded floats without and with scaling, and as int8 themselves."""
    scaled = Arm("int8 with QAS", integers(count, scaled=True), rates=SCALED_RATES)
    return (
        Arm("int8 without QAS", integers(count, scaled=False), rates=UNSCALED_RATES),
        scaled,
        # the same gradients on the same integers: only how a step is rounded differs
        Arm("int8 state with QAS", integers(count, scaled=True, state=Stepped), rate_of=scaled),
    )


ROWS: tuple[tuple[Case, Arm], ...] = (
    *((DIGITS, arm) for arm in (plain(None), BEFORE, HEAD, *int8(None), *chains(None), exact(None))),
    (DIGITS, exact(None, scales=True)),
    *((CIFAR, arm) for arm in (plain(6), BEFORE, *int8(6), HEAD, *chains(6), exact(6), exact(6, scales=True))),
    # the last three inverted residual blocks and the convolution behind them: ten convolutions
    *((FLOWERS, arm) for arm in (plain(10), mobiletl(3), *chains(10), HEAD, exact(10))),
)
"""The default grid, the deciding rows first."""


def search(bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
    """The worst of some seeds: a rate on the edge of what is stable must not be chosen because one of them held."""
    found = [adapt(bench, arm, split, rate, seed + more) for more in range(SEARCHED_SEEDS)]
    return {**max(found, key=lambda line: line["test_loss"]), "searched_seeds": SEARCHED_SEEDS}


def study(bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
    """Accuracy and bytes kept of a cell; in the first of a row, what a step costs beside one of plain."""
    found = {**adapt(bench, arm, split, rate, seed), "threads": torch.get_num_threads(), "clock": CLOCK}
    costed = arm.trains and seed == 0
    return {**found, **(step_costs(bench, arm, GRID.plain(bench.case), split) if costed else {})}


GRID = Grid(
    "training",
    (DIGITS, CIFAR, FLOWERS),
    ROWS,
    study=study,
    search=search,
    facts=("threads", "clock"),
    medians=("peak_bytes", "forward_macs", "backward_macs", "method_ms", "baseline_ms", "speedup"),
)
summarise = GRID.summarise


def run(options: Options | None = None) -> dict[str, Any]:
    """Work through the cells that are not there yet, then summarise: {machine, versions, git, rows}."""
    return GRID.run(options or Options())
