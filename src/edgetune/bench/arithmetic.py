"""`edgetune bench arithmetic`: networks of bits and of additions beside the float network, trained alike.

CIFAR-10, three seeds. Every arm starts from the same float weights, which have been taught all 50 000 pictures before
(`bench.pretrain`), and sees the same batches; the schedules are far shorter than the published ones (400 epochs on all
pictures), and stand in every line. The learning rate of the float network, and of VGG-small by additions, is chosen on
pictures held out, any other is that of the method's recipe. The first convolution, shortcuts and the head stay in
float. Adder networks in few bits are the trained adder network of the same seed, whose ranges and norms are then fitted
to training pictures.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgetune.bench.adapt import adapt, chunks, tested, trained, trainee_of
from edgetune.bench.arms import BATCH, Arm, Trainee, arithmetic, unfrozen
from edgetune.bench.cases import Bench, Case, Recipe, pupil
from edgetune.bench.cells import Line, cell_key, written_once
from edgetune.bench.grid import PLAIN, Grid, GridOptions
from edgetune.bench.photos import Photos, Split, plain_cifar
from edgetune.bench.pretrain import Cycle, Lesson
from edgetune.compress import quantize_layers
from edgetune.contract import ArithmeticMethod
from edgetune.data.chance import permutation
from edgetune.data.preprocess import Preprocess
from edgetune.distil import Distil
from edgetune.hosts.arithmetic import arithmetic_layers
from edgetune.methods.arithmetic.addernet import AdderNet
from edgetune.methods.arithmetic.dir_net import DIRNet
from edgetune.methods.arithmetic.quantized_adder import QuantizedAdder
from edgetune.methods.arithmetic.xnor import XNOR
from edgetune.packed import PackedNetwork, pack, rounded


class Options(GridOptions):
    """What to run, and where cells are stored."""

    out: str = "bench/results/arithmetic.jsonl"




def cifar(limit: int, every: int = 1) -> Callable[..., Photos]:
    """CIFAR-10 as it is: so many pictures to train on, and of as many others every so many-th to test."""

    def photos(root: Path, preprocess: Preprocess, limit: int = limit, seeds: int = 3) -> Photos:
        found = plain_cifar(root, preprocess, limit, seeds)
        return replace(found, splits=tuple((train, test[::every]) for train, test in found.splits))

    return photos


LIVE = Recipe(momentum=0.9, clip=None, clock="cpu")
"""Norms follow their batches in all arms."""


def lesson(network: str, epochs: int) -> Lesson:
    """How a float network is taught that all arms start from."""
    return Lesson(network=network, size=32, cycles=(Cycle(epochs=epochs, peak_rate=0.1, frozen=False),))


RESNET20 = Case(
    "resnet20_bireal@32",
    pupil(lesson("resnet20_bireal", 5), cifar(10_000)),
    *(32, 3, None, (0.0003, 0.001, 0.003), LIVE),
)
VGG_SMALL = Case(
    "vgg_small@32",
    pupil(lesson("vgg_small", 1), cifar(3_000, every=2)),
    *(32, 1, None, (0.0001, 0.0003, 0.001), LIVE),
)
"""40 ms a picture and step on one core, five times those of ResNet-20: hence the shorter schedule."""
DISTILLED, ALIGNED = Distil(logits=1.0), Distil(features=1.0, logits=1.0)


def by(method: ArithmeticMethod, distil: Distil | None = None) -> Arm:
    """A row of an arithmetic method, at the rate of its recipe."""
    rate = float(method.recipe["learning_rate"])
    taught = "" if distil is None else ", aligned" if distil.features else ", distilled"
    return Arm(method.label + taught, arithmetic(method, distil), rates=(rate,))


@dataclass(frozen=True)
class Adder(Arm):
    """The adder network, whose layers compute by `after` once it has been trained."""

    after: QuantizedAdder | None = None


def adders(*rates: float) -> tuple[Arm, ...]:
    """The trained adder network, as it is and in few bits."""
    whole = Adder(ADDER.label, arithmetic(ADDER), rates=rates)
    few = (QuantizedAdder(bits=bits) for bits in (8, 6, 5, 4))
    return whole, *(replace(whole, method=each.label, after=each, rates=None, rate_of=whole) for each in few)


ADDER = AdderNet()
ARMS = (
    Arm(PLAIN, unfrozen("adamw")),
    by(XNOR()),
    by(DIRNet(alive=0.0)),
    by(DIRNet()),
    by(DIRNet(), DISTILLED),
    by(XNOR(activations=False)),
)


AT_ONCE = 100
"""Pictures that are tested together."""


def packed(model: nn.Module, bench: Bench, test: Sequence[int]) -> Line:
    """What the packed network says of the test pictures, where there is one.

    Its accuracy, how many of the pictures the trained network, its other weights rounded as the file has them, puts in
    another class, and how far the logits of the two are apart at most.
    """
    methods = [layer.method for layer in arithmetic_layers(model).values()]
    if not methods or any(method.unpacked() is not None for method in methods):
        return {}
    source, labels = bench.source(), bench.photos().labels[list(test)]
    few, simulated = PackedNetwork(pack(model, source.seen(test[:1], None).shape)), rounded(model)
    both = []
    with torch.no_grad():
        for part in chunks(test, AT_ONCE):
            x = source.seen(part, None).contiguous(memory_format=torch.channels_last)
            both.append(torch.stack((few(x), simulated(x))))
    ours, theirs = torch.cat(both, dim=1)
    return {
        "packed_accuracy": 100 * float((ours.argmax(1) == labels).double().mean()),
        "packed_other": int((ours.argmax(1) != theirs.argmax(1)).sum()),
        "packed_apart": float((ours - theirs).abs().max()),
    }


def answers(trainee: Trainee, bench: Bench, split: Split) -> Line:
    """What the network says of the test pictures, and its packed form."""
    return {**tested(trainee, bench, split), **packed(trainee.model, bench, split[1])}


FITTED_TO = 8
"""Batches of training pictures that ranges and norms are fitted to."""


def study(bench: Bench, arm: Arm, split: Split, rate: float, seed: int) -> Line:
    """A cell. The adder network of a seed is trained once for all of its rows: the temporary folder remembers it."""
    if isinstance(arm, Adder):
        return _added(bench, arm, split, rate, seed)
    started = time.perf_counter()
    trainee, curve = trained(bench, arm, split, rate, seed)
    found = answers(trainee, bench, split)
    return {**found, "curve": curve, "seconds": round(time.perf_counter() - started, 1)}


def _added(bench: Bench, arm: Adder, split: Split, rate: float, seed: int) -> Line:
    known = {"case": bench.case.name, **bench.case.identity, "quick": bench.quick, "rate": rate, "seed": seed}
    path = Path(tempfile.gettempdir()) / f"edgetune-adder-{cell_key(known)}.safetensors"

    def write(partial: Path) -> None:
        save_file(trained(bench, arm, split, rate, seed)[0].model.state_dict(), partial)

    written_once(path, write)
    trainee, source = trainee_of(bench, arm, split[0], seed), bench.source()
    trainee.model.load_state_dict(load_file(path))
    if arm.after is not None:
        # pictures lie class by class
        drawn = [split[0][i] for i in permutation(len(split[0]), "fitted", seed)[: FITTED_TO * BATCH]]
        quantize_layers(trainee.model, arm.after, [source.seen(part, None) for part in chunks(drawn, BATCH)])
    return {**answers(trainee, bench, split), "curve": [], "seconds": None}


GRID = Grid(
    "arithmetic",
    (RESNET20, VGG_SMALL),
    (
        *((RESNET20, arm) for arm in (*ARMS, *adders(float(ADDER.recipe["learning_rate"])))),
        (RESNET20, by(DIRNet(), ALIGNED)),  # VGG-small has no blocks whose maps could be compared
        *((VGG_SMALL, arm) for arm in (*ARMS, *adders(0.003, 0.01, 0.03))),  # learns nothing at the recipe's rate
    ),
    study=study,
    search=adapt,
    medians=("packed_accuracy",),
    worst=("packed_other", "packed_apart"),
)
summarise = GRID.summarise


def run(options: Options | None = None) -> dict[str, Any]:
    """Work through the cells that are not there yet, then summarise: {machine, versions, git, rows}."""
    return GRID.run(options or Options())
