"""What the accuracy benches adapt: a pretrained network, what of it learns, on which photos and by which recipe.

Where only the last blocks learn, the frozen ones run once a photo and view, and their maps are trained from:
the gradients are the same, as nothing in front of the learning part changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from edgetune.bench.photos import Maps, Photos, behind, drifted_cifar, drifted_digits, flowers
from edgetune.bench.timing import Clock
from edgetune.data.preprocess import Preprocess
from edgetune.models.head import replace_head
from edgetune.models.loading import load_weights
from edgetune.models.registry import load_model, model_card, shipped_weights

SHARED_PREFIX = 15
"""Blocks of MobileNetV2 in front of every part that learns alone: their maps serve all of these."""
_QUICK = (200, 2)


@dataclass(frozen=True)
class Start:
    """Where a network starts: its weights below the data folder (None: those of the package), and its photos."""

    weights: str | None
    photos: Callable[..., Photos]
    fresh_head: bool = False
    """Whether the photos have other classes than the weights were trained for."""


STARTS = {
    "mobilenet_v2_tf": Start("weights/mobilenet_v2_1.0_224_imagenet1001_dequant.safetensors", flowers, fresh_head=True),
    "resnet20": Start("weights/resnet20_cifar10.safetensors", drifted_cifar),
    "digits_net": Start(None, drifted_digits),
}


@dataclass(frozen=True)
class Recipe:
    """How every arm of a case is trained: SGD, gradients clipped to the norm `clip` (None: as they are).

    `clock` is what a step's time is read from.
    """

    momentum: float = 0.9
    clip: float | None = 2.0
    clock: Clock = "wall"


@dataclass(frozen=True)
class Case:
    """What learns, on which photos: `first` is the first learning block of `features` (None: as the arm says).

    `rates` are the learning rates to choose from.
    """

    name: str
    network: str
    size: int
    epochs: int
    first: int | None
    rates: tuple[float, ...]
    recipe: Recipe = Recipe()

    @property
    def identity(self) -> dict[str, Any]:
        """What a cell of this case is known by, its name aside."""
        return {"size": self.size, "epochs": self.epochs, "network": self.network}


@dataclass(frozen=True)
class Bench:
    """One case with its photos; `quick` takes few of them."""

    case: Case
    data: str
    quick: bool = False

    def photos(self) -> Photos:
        """The case's photos, decoded once a process."""
        return _photos(self.case.network, self.case.size, self.data, self.quick)

    def source(self) -> Maps | Photos:
        """What the learning part reads: photos, or their maps behind the frozen blocks."""
        return _maps(self)

    def learning_part(self, seed: int) -> nn.Module:
        """The part of the pretrained network that learns, in eval mode."""
        model = self._network(seed)
        if self.case.first is None:
            return model
        features, pool, head = (model.get_submodule(name) for name in ("features", "pool", "classifier"))
        return nn.Sequential(*list(features.children())[self.case.first :], pool, nn.Flatten(1), head).eval()

    def _network(self, seed: int) -> nn.Module:
        start = STARTS[self.case.network]
        options: dict[str, Any] = {"dropout": 0.0} if start.fresh_head else {}
        model = load_model(self.case.network, **options)
        path = shipped_weights(self.case.network) if start.weights is None else Path(self.data) / start.weights
        assert path is not None
        load_weights(model, path)
        if start.fresh_head:
            replace_head(model, 5, seed=seed)
        return model


@cache
def _photos(network: str, size: int, data: str, quick: bool) -> Photos:
    preprocess = Preprocess.from_input(model_card(network).input).model_copy(update={"size": (size, size)})
    return STARTS[network].photos(Path(data), preprocess, *(_QUICK if quick else ()))


@cache
def _maps(bench: Bench) -> Maps | Photos:
    case, photos = bench.case, bench.photos()
    if case.first is None:
        return photos
    model = bench._network(0)
    blocks, pool = list(model.get_submodule("features").children()), model.get_submodule("pool")
    name = f"{case.network}:features"
    shared = behind(photos, nn.Sequential(*blocks[:SHARED_PREFIX]), case.epochs, f"{name}:{SHARED_PREFIX}")
    if case.first == SHARED_PREFIX:
        return shared
    # the head reads means alone, and the learning part's own pooling leaves them as they are
    rest = blocks[SHARED_PREFIX : case.first] + ([pool] if case.first == len(blocks) else [])
    return behind(shared, nn.Sequential(*rest), case.epochs, f"{name}:{case.first}")
