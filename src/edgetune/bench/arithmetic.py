"""`edgetune bench arithmetic`: networks of bits and of additions beside the float network, trained alike.

CIFAR-10, three seeds. Every arm starts from the same float weights and sees the same batches; the recipe is that of the
default grid, far shorter than the published ones (400 epochs on all 50 000 pictures), and stands in every line. A
learning rate is the method's own; the first convolution, shortcuts and the head stay in float.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.bench.adapt import adapt
from edgetune.bench.arms import Arm, Prepare, arithmetic, unfrozen
from edgetune.bench.cases import Case, Recipe, Start, found
from edgetune.bench.grid import PLAIN, Grid, GridOptions
from edgetune.bench.photos import Photos, plain_cifar
from edgetune.contract import ArithmeticMethod
from edgetune.data.preprocess import Preprocess
from edgetune.distil import Distil
from edgetune.methods.arithmetic.dir_net import DIRNet
from edgetune.methods.arithmetic.xnor import XNOR


class Options(GridOptions):
    """What to run, and where cells are stored."""

    out: str = "bench/results/arithmetic.jsonl"


PICTURES = 10_000
"""To train on, and as many to test."""


def cifar(root: Path, preprocess: Preprocess, limit: int = PICTURES, seeds: int = 3) -> Photos:
    """CIFAR-10 as it is."""
    return plain_cifar(root, preprocess, limit, seeds)


LIVE = Recipe(momentum=0.9, clip=None, clock="cpu")
RESNET20 = Case(
    "resnet20_bireal@32",
    Start("resnet20_bireal", found("resnet20_cifar10.safetensors"), cifar),
    *(32, 6, None, (0.02,), LIVE),
)
ALIGNED = Distil(features=1.0, logits=1.0)


def arm(name: str, prepare: Prepare, rate: float) -> Arm:
    """A row with a learning rate of its own."""
    return Arm(name, prepare, rates=(rate,))


def by(method: ArithmeticMethod, distil: Distil | None = None) -> Arm:
    """A row of an arithmetic method, at the rate of its recipe."""
    rate = float(method.recipe["learning_rate"])
    label = method.label + (", distilled" if distil else "")
    return arm(label, arithmetic(method, distil), rate)


ARMS = (
    replace(arm(PLAIN, unfrozen, 0.02), rates=None),
    by(XNOR()),
    by(DIRNet(alive=0.0)),
    by(DIRNet()),
    by(DIRNet(), ALIGNED),
    by(XNOR(activations=False)),
)
GRID = Grid(
    "arithmetic",
    (RESNET20,),
    tuple((RESNET20, each) for each in ARMS),
    study=adapt,
    search=adapt,
)
summarise = GRID.summarise


def run(options: Options | None = None) -> dict[str, Any]:
    """Work through the cells that are not there yet, then summarise: {machine, versions, git, rows}."""
    return GRID.run(options or Options())
