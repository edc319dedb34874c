"""What the accuracy benches adapt: a pretrained network, what of it learns, on which photos and by which recipe.

Where only the last blocks learn, the frozen ones run once a photo and view, and their maps are trained from:
the gradients are the same, as nothing in front of the learning part changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from edgetune.bench.photos import Maps, Photos, behind, drifted_cifar, drifted_digits, flowers, plain_cifar
from edgetune.bench.pretrain import Lesson, taught
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
    """Where a network starts: the file of its weights, found or made below the data folder, and its photos.

    `crop` is the share of a photo's sides that is seen (None: as the network's card says).
    """

    network: str
    weights: Callable[[Path], Path]
    photos: Callable[..., Photos]
    classes: int | None = None
    """Those of the weights; None: the card's."""
    fresh_head: bool = False
    """Whether the photos have other classes than the weights were trained for."""
    crop: float | None = None

    def preprocess(self, size: int) -> Preprocess:
        """How the network sees photos at `size` px."""
        card = Preprocess.from_input(model_card(self.network).input)
        return card.model_copy(update={"size": (size, size), "crop_fraction": self.crop or card.crop_fraction})

    def model(self, data: Path, seed: int) -> nn.Module:
        """The pretrained network in eval mode, without dropout; `seed` decides a fresh head."""
        model = load_model(self.network, self.classes)
        load_weights(model, self.weights(data))
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        if self.fresh_head:
            replace_head(model, 5, seed=seed)
        return model


def found(name: str) -> Callable[[Path], Path]:
    """Weights that lie in the data folder."""
    return lambda data: data / "weights" / name


def _shipped(data: Path) -> Path:
    path = shipped_weights("digits_net")
    assert path is not None
    return path


def pupil(lesson: Lesson, photos: Callable[..., Photos], fresh_head: bool = False) -> Start:
    """A network that was taught before (see `bench.pretrain`)."""
    return Start(lesson.network, lambda data: taught(lesson, data), photos, lesson.classes, fresh_head, crop=1.0)


IMAGENET_V2 = Start(
    "mobilenet_v2_tf", found("mobilenet_v2_1.0_224_imagenet1001_dequant.safetensors"), flowers, fresh_head=True
)
RESNET20 = Start("resnet20", found("resnet20_cifar10.safetensors"), drifted_cifar)
RESNET20_JPEG = Start("resnet20", found("resnet20_cifar10.safetensors"), plain_cifar)
DIGITS_NET = Start("digits_net", _shipped, drifted_digits)


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
    start: Start
    size: int
    epochs: int
    first: int | None
    rates: tuple[float, ...]
    recipe: Recipe = Recipe()

    @property
    def identity(self) -> dict[str, Any]:
        """What a cell of this case is known by, its name aside."""
        return {"size": self.size, "epochs": self.epochs, "network": self.start.network}


@dataclass(frozen=True)
class Bench:
    """One case with its photos; `quick` takes few of them."""

    case: Case
    data: str
    quick: bool = False

    def photos(self) -> Photos:
        """The case's photos, decoded once a process."""
        return _photos(self.case.start, self.case.size, self.data, self.quick)

    def source(self) -> Maps | Photos:
        """What the learning part reads: photos, or their maps behind the frozen blocks."""
        return _maps(self)

    def learning_part(self, seed: int) -> nn.Module:
        """The part of the pretrained network that learns, in eval mode."""
        model = self.network(seed)
        if self.case.first is None:
            return model
        features, pool, head = (model.get_submodule(name) for name in ("features", "pool", "classifier"))
        return nn.Sequential(*list(features.children())[self.case.first :], pool, nn.Flatten(1), head).eval()

    def whole(self) -> Bench:
        """The same, with the network in one piece."""
        return replace(self, case=replace(self.case, first=None))

    def network(self, seed: int) -> nn.Module:
        """The whole pretrained network, in eval mode."""
        return self.case.start.model(Path(self.data), seed)


@cache
def _photos(start: Start, size: int, data: str, quick: bool) -> Photos:
    return start.photos(Path(data), start.preprocess(size), *(_QUICK if quick else ()))


@cache
def _maps(bench: Bench) -> Maps | Photos:
    case, photos = bench.case, bench.photos()
    if case.first is None:
        return photos
    model = bench.network(0)
    blocks, pool = list(model.get_submodule("features").children()), model.get_submodule("pool")
    name = f"{case.start.network}:features"
    front = min(case.first, SHARED_PREFIX)
    shared = behind(photos, nn.Sequential(*blocks[:front]), case.epochs, f"{name}:{front}")
    if case.first == front:
        return shared
    # the head reads means alone, and the learning part's own pooling leaves them as they are
    rest = blocks[SHARED_PREFIX : case.first] + ([pool] if case.first == len(blocks) else [])
    return behind(shared, nn.Sequential(*rest), case.epochs, f"{name}:{case.first}")
