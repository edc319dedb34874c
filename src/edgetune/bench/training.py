"""`edgetune bench training`: the ways to train on a device side by side, on the same network, photos and seeds.

Three seeds on digits and CIFAR-10, five folds on flowers5, six seeds at 224 px. The head learns everywhere. Networks
whose weights are not at hand have been taught CIFAR-10 before (`bench.pretrain`). Every arm is trained by SGD without
momentum and without clipping, so that nothing but the network and its gradients has to be held. Each has a learning
rate of its own, chosen among some around where it learns at all, because blurred gradients, a head alone and integers
have each their own scale; "exact", "MobileTL", "last ...", "sparse ..." and "... and gains" take plain's, and "int8
state with QAS" that of the rounded floats. A rate counts by the worst of three seeds.

"plain" is stock autograd with norms in eval, all that the case lets learn: weights, norm scales and norm shifts.
"exact" and "pooled chain" learn weights and shifts, and those "with scales" the scales too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from edgetune.bench.adapt import adapt
from edgetune.bench.arms import (
    KEPT,
    Arm,
    chain,
    held,
    integers,
    last,
    leave,
    low_rank,
    planned,
    recomputed,
    scheme,
    stock,
    tinytl,
)
from edgetune.bench.cases import DIGITS_NET, IMAGENET_V2, RESNET20, RESNET20_JPEG, Bench, Case, Recipe, pupil
from edgetune.bench.cells import Line
from edgetune.bench.costs import CLOCK, kept_of_whole, step_costs
from edgetune.bench.grid import PLAIN, Grid, GridOptions
from edgetune.bench.photos import SHOWN, Split, drifted_cifar, drifted_flowers
from edgetune.bench.pretrain import Lesson, cycles
from edgetune.methods.backward.exact import Exact
from edgetune.methods.backward.hosvd import HOSVD
from edgetune.methods.backward.lance import LANCE
from edgetune.methods.backward.mobiletl import MobileTL, last_blocks
from edgetune.quantize import Stepped, scale_gradients


class Options(GridOptions):
    """What to run, and where cells are stored."""

    out: str = "bench/results/training.jsonl"


RATES = (0.003, 0.01, 0.03, 0.1)
CHAIN_RATES = (0.003, 0.01, 0.03)
HEAD_RATES = (0.3, 1.0, 3.0, 10.0)
BRANCH_RATES = (0.01, 0.03, 0.1, 0.3)
SCALED_RATES = (0.003, 0.01, 0.03)
UNSCALED_RATES = (0.3, 1.0, 3.0, 10.0)
"""Without quantization-aware scaling gradients of integers are small, by how much nobody knows beforehand."""
SEARCHED_SEEDS = 3
BARE = Recipe(momentum=0.0, clip=None, clock="cpu")

DIGITS = Case("digits_net@32 all", DIGITS_NET, 32, 10, None, RATES, BARE)
CIFAR = Case("resnet20@32 last 6", RESNET20, 32, 3, None, RATES, BARE)
JPEG = Case("resnet20@32 last 6 undrifted", RESNET20_JPEG, 32, 3, None, RATES, BARE)
FLOWERS = Case("mobilenet_v2@160 last 4 blocks", IMAGENET_V2, 160, 3, 15, RATES, BARE)
V3 = Case(
    "mobilenet_v3_small@64 last 4 blocks",
    pupil(Lesson(network="mobilenet_v3_small", size=64), drifted_cifar),
    *(64, 3, None, RATES, BARE),
)
MCUNET = Case(
    "mcunet@64 last 4 blocks",
    pupil(Lesson(network="mcunet", size=64), drifted_cifar),
    *(64, 3, None, RATES, BARE),
)
RESNET18 = Case(
    "resnet18@32 last 4",
    pupil(Lesson(network="resnet18", size=32), drifted_cifar),
    *(32, 3, None, RATES, BARE),
)
RESNET18_ALL = Case(
    "resnet18@32 all",
    pupil(Lesson(network="resnet18", size=32), drifted_cifar),
    *(32, 3, None, RATES, BARE),
)
RESNET18_224 = Case(
    "resnet18@224 all",
    pupil(
        Lesson(network="resnet18", size=224, cycles=cycles(8, 3), data="flowers5_224", classes=5, limit=SHOWN,
               after=Lesson(network="resnet18", size=32)),
        drifted_flowers,
    ),
    *(224, 1, None, (0.003,), BARE),
)  # fmt: skip
SPARSE = Case(
    "mobilenet_v2_0.35@64 last 25",
    pupil(Lesson(network="mobilenet_v2_0.35", size=64, cycles=cycles(8, 3)), drifted_cifar),
    *(64, 5, 10, RATES, BARE),
)
"""The last 25 convolutions are what the published 99 KB scheme lets learn."""

BEFORE = Arm("before", stock(), trains=False)
HEAD = Arm("head only", stock(0), rates=HEAD_RATES)
AGAIN = Arm("checkpointed", recomputed(6))
FRESH_HEAD = replace(HEAD, rates=(0.01, 0.03, 0.1))
"""A head that knows nothing yet, on many features."""


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


def bits(blocks: int) -> tuple[Arm, ...]:
    """MobileTL on a network with hard-swish: two bits of its slope, and one."""
    made = {2: "two bits", 1: "one bit"}
    return tuple(
        Arm(f"MobileTL, {name}", planned(partial(last_blocks, count=blocks, method=MobileTL(hardswish_bits=number))))
        for number, name in made.items()
    )


def branches(blocks: int) -> Arm:
    """TinyTL: lite residuals and biases of the last blocks."""
    return replace(tinytl(blocks), method="TinyTL", rates=BRANCH_RATES)


def sparse(name: str) -> Arm:
    """A published sparse update."""
    return Arm(f"sparse {name}", scheme(name))


def coded(count: int | None) -> tuple[Arm, ...]:
    """Exact gradients from what is held in fewer bytes; the scales of norms learn, as with plain."""
    return tuple(Arm(name, held(count, method)) for name, method in KEPT.items())


def ranks(count: int) -> tuple[Arm, ...]:
    """What is kept as factors, in so many times fewer bytes."""
    return (
        *(Arm(f"ASI, {times}x", low_rank(count, times)) for times in (10, 50)),
        Arm("ASI, 50x, without scales", low_rank(count, 50, scales=False)),
    )


def bases(count: int) -> tuple[Arm, ...]:
    """Factors whose bases are found anew in each step, and in the first one alone."""
    return tuple(Arm(name, planned(last(count, method, scales=True)))
                 for name, method in (("HOSVD", HOSVD()), ("LANCE", LANCE())))  # fmt: skip


def int8(count: int | None) -> tuple[Arm, ...]:
    """Integer networks whose steps are those of the float network, at its rate: rounded floats, and int8 themselves."""
    return (
        Arm("int8 with QAS and gains", integers(count)),
        Arm("int8 state with QAS and gains", integers(count, state=Stepped)),
    )


def int8_published(count: int | None) -> tuple[Arm, ...]:
    """Integer networks without scaling and with the published one, at rates of their own."""
    published = partial(scale_gradients, gains=False)
    scaled = Arm("int8 with QAS", integers(count, published), rates=SCALED_RATES)
    return (
        Arm("int8 without QAS", integers(count, leave), rates=UNSCALED_RATES),
        scaled,
        # the same gradients on the same integers: only how a step is rounded differs
        Arm("int8 state with QAS", integers(count, published, Stepped), rate_of=scaled),
    )


ROWS: tuple[tuple[Case, Arm], ...] = (
    *((DIGITS, arm) for arm in (plain(None), BEFORE, HEAD, *int8_published(None), *chains(None), exact(None))),
    *((DIGITS, arm) for arm in (exact(None, scales=True), *int8(None), *coded(None))),
    *(
        (CIFAR, arm)
        for arm in (plain(6), BEFORE, *int8_published(6), HEAD, *chains(6), exact(6), exact(6, scales=True))
    ),
    *((CIFAR, arm) for arm in (*int8(6), branches(3), *coded(6), *ranks(6), *bases(6), AGAIN)),
    # the last three inverted residual blocks and the convolution behind them: ten convolutions
    *((FLOWERS, arm) for arm in (plain(10), mobiletl(3), exact(10), FRESH_HEAD, branches(3), *chains(10)[:2])),
    *((FLOWERS, arm) for arm in (*coded(10)[:3], *ranks(10))),
    *((SPARSE, arm) for arm in (plain(25), HEAD)),
    *((SPARSE, replace(exact(count), method=f"last {count}")) for count in (2, 4, 6, 9, 12, 16, 20, 25)),
    *((SPARSE, sparse(f"mobilenet_v2_0.35-{size}KB")) for size in (49, 73, 99)),
    *((JPEG, arm) for arm in (plain(6), BEFORE, *int8(6), *chains(6)[:1], exact(6))),
    *((V3, arm) for arm in (plain(21), BEFORE, HEAD, *bits(4), *chains(21)[:1], exact(21))),
    *((MCUNET, arm) for arm in (plain(12), BEFORE, HEAD, *int8(12), sparse("mcunet-99KB"), *chains(12)[:1], exact(12))),
    *((JPEG, arm) for arm in coded(6)[:3]),
    *((V3, arm) for arm in coded(21)[:3]),
    *((MCUNET, arm) for arm in coded(12)[:3]),
    *((SPARSE, arm) for arm in coded(25)[:3]),
    *((RESNET18, arm) for arm in (plain(4), BEFORE, HEAD, *chains(4)[:1], exact(4))),
    *((RESNET18_ALL, arm) for arm in (plain(None), *coded(None))),
    *((RESNET18_224, arm) for arm in (plain(None), BEFORE, *coded(None)[:1])),
)
"""The default grid, the deciding rows first."""


def search(bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
    """The worst of some seeds: a rate on the edge of what is stable must not be chosen because one of them held."""
    found = [adapt(bench, arm, split, rate, seed + more) for more in range(SEARCHED_SEEDS)]
    return {**max(found, key=lambda line: line["test_loss"]), "searched_seeds": SEARCHED_SEEDS}


def study(bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
    """Accuracy and bytes kept of a cell; in the first of a row, what a step costs beside one of plain."""
    found = {**adapt(bench, arm, split, rate, seed), "threads": torch.get_num_threads(), "clock": CLOCK}
    if bench.case.first is not None:
        found["kept_bytes"] = kept_of_whole(bench, arm, split)
    costed = arm.trains and seed == 0
    return {**found, **(step_costs(bench, arm, GRID.plain(bench.case), split) if costed else {})}


GRID = Grid(
    "training",
    (DIGITS, CIFAR, JPEG, FLOWERS, SPARSE, V3, MCUNET, RESNET18, RESNET18_ALL, RESNET18_224),
    ROWS,
    study=study,
    search=search,
    facts=("threads", "clock"),
    medians=("peak_bytes", "forward_macs", "backward_macs", "moved_bytes", "method_ms", "baseline_ms", "speedup"),
)
summarise = GRID.summarise


def run(options: Options | None = None) -> dict[str, Any]:
    """Work through the cells that are not there yet, then summarise: {machine, versions, git, rows}."""
    return GRID.run(options or Options())
