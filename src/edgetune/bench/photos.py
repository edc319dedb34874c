"""The photos of the accuracy benches: folds, repeatable views, and their maps behind frozen layers.

Order and views depend on (epoch, photo) alone, so that every method of a fold sees the same batches.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edgetune.bench.cells import cell_key, written_once
from edgetune.data.augment import augment
from edgetune.data.chance import generator_for, permutation
from edgetune.data.dataset import Dataset
from edgetune.data.loading import load_data, open_source
from edgetune.data.preprocess import Preprocess
from edgetune.data.settings import Augment
from edgetune.data.source import TRAIN, thin

Split = tuple[list[int], list[int]]
SHOWN = 1000
"""Photos of flowers that a network is taught with before it meets them through another camera."""


@dataclass(frozen=True)
class Photos:
    """`pixels` uint8 (n c h w) and `labels` (n); `splits` has (train, test), one a fold or a seed."""

    name: str
    pixels: torch.Tensor
    labels: torch.Tensor
    splits: tuple[Split, ...]
    preprocess: Preprocess
    views: Augment

    def seen(self, photos: Sequence[int], epoch: int | None) -> torch.Tensor:
        """float32 (n c h w): the views of an epoch, or the photos as they are (None)."""
        clean = self.preprocess.normalise(self.pixels[list(photos)])
        if epoch is None:
            return clean
        return torch.stack(
            [
                augment(x, generator_for("view", epoch, photo), self.views)
                for x, photo in zip(clean, photos, strict=True)
            ]
        )


@dataclass(frozen=True)
class Maps:
    """Photos behind frozen layers: `maps` (e + 1, n, c, h, w), of the photos themselves and each epoch."""

    photos: Photos
    maps: torch.Tensor

    def seen(self, photos: Sequence[int], epoch: int | None) -> torch.Tensor:
        """What `Photos.seen` gives, after the frozen part."""
        return self.maps[0 if epoch is None else epoch + 1, list(photos)]


def stratified_folds(labels: torch.Tensor, count: int, seed: int = 0) -> tuple[Split, ...]:
    """`count` disjoint test parts with equal shares of every class, each with the rest to train on."""
    tests: list[list[int]] = [[] for _ in range(count)]
    position = 0
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().flatten().tolist()
        for index in permutation(len(members), "folds", seed, label):
            tests[position % count].append(members[index])
            position += 1
    everything = range(len(labels))
    return tuple((sorted(set(everything) - set(test)), sorted(test)) for test in tests)


def inner_split(photos: Photos) -> Split:
    """For choosing the learning rate: the first split's training part, divided once more (4 : 1)."""
    members = photos.splits[0][0]
    train, held_out = stratified_folds(photos.labels[members], 5, seed=1)[0]
    return [members[i] for i in train], [members[i] for i in held_out]


def flowers(root: Path, preprocess: Preprocess, limit: int | None = None, folds: int = 5) -> Photos:
    """All photos of flowers5, training and validation parts together, in stratified folds."""
    pixels, labels = _everything(load_data(root / "flowers5_224", preprocess, limit=limit))
    return Photos("flowers5", pixels, labels, stratified_folds(labels, folds), preprocess, Augment(crop_scale=0.6))


def drifted_flowers(root: Path, preprocess: Preprocess, limit: int = SHOWN, seeds: int = 6) -> Photos:
    """flowers5 through another camera, for all seeds: to train on what `limit` of its training photos look like there,
    and to test on all others."""
    folder = root / "flowers5_224"
    listed = open_source(folder)
    known = set(thin(listed.splits[TRAIN], limit, len(listed.classes), seed=0).names)  # as `load_data` does
    dataset = load_data(f"{folder}:drift", preprocess)
    split: Split = ([], [])
    for index, name in enumerate((*dataset.train.names, *dataset.val.names)):
        split[name not in known].append(index)
    return Photos("flowers5:drift", *_everything(dataset), (split,) * seeds, preprocess, Augment(crop_scale=0.6))


def drifted_cifar(root: Path, preprocess: Preprocess, limit: int = 2000, seeds: int = 3) -> Photos:
    """CIFAR-10 through another camera: `limit` photos to train on and as many to test, for all seeds."""
    os.environ.setdefault("EDGETUNE_DATA", str(root))
    return _one_split("cifar10:drift", preprocess, limit, seeds, Augment(shift_px=3))


def plain_cifar(root: Path, preprocess: Preprocess, limit: int = 2000, seeds: int = 3) -> Photos:
    """CIFAR-10 as it is: `limit` photos to train on and as many to test, for all seeds."""
    os.environ.setdefault("EDGETUNE_DATA", str(root))
    return _one_split("cifar10", preprocess, limit, seeds, Augment(shift_px=3))


def drifted_digits(root: Path, preprocess: Preprocess, limit: int | None = None, seeds: int = 3) -> Photos:
    """The built-in digits through another camera: 600 to train on and 400 to test, for all seeds."""
    return _one_split("digits:drift", preprocess, limit, seeds, None)


def _one_split(data: str, preprocess: Preprocess, limit: int | None, seeds: int, views: Augment | None) -> Photos:
    """A data set with validation pictures of its own, for all seeds; its own views unless given."""
    dataset = load_data(data, preprocess, limit=limit)
    pixels, labels = _everything(dataset)
    train, everything = len(dataset.train), len(labels)
    split = (list(range(train)), list(range(train, everything)))
    return Photos(data, pixels, labels, (split,) * seeds, preprocess, views or dataset.augment)


def _everything(dataset: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 pixels (n c h w) and labels (n), those to train on in front."""
    parts = (dataset.train, dataset.val)
    pixels = torch.stack([part.pixels(i) for part in parts for i in range(len(part))])
    return pixels, torch.tensor([label for part in parts for label in part.labels])


def behind(source: Photos | Maps, frozen: nn.Module, epochs: int, name: str) -> Maps:
    """Run photos and their views through the frozen part `name` once; the temporary folder keeps the maps."""
    photos = source if isinstance(source, Photos) else source.photos
    key = cell_key(
        {
            "part": name,
            "size": photos.preprocess.size,
            "photos": len(photos.labels),
            "epochs": epochs,
            "views": photos.views.model_dump(),
            "data": photos.name,
        }
    )
    path = Path(tempfile.gettempdir()) / f"edgetune-maps-{key}.pt"

    def build() -> torch.Tensor:
        frozen.eval()
        with torch.no_grad():
            return torch.stack(
                [
                    torch.cat(
                        [
                            frozen(source.seen(part.tolist(), epoch)).contiguous()
                            for part in torch.arange(len(photos.labels)).split(50)
                        ]
                    )
                    for epoch in (None, *range(epochs))
                ]
            )

    return Maps(photos, built_once(path, build))


def built_once(path: Path, build: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor in a file, made by `build` where it is not there yet; other processes wait for it."""
    written_once(path, lambda partial: torch.save(build(), partial))
    tensor: torch.Tensor = torch.load(path, mmap=True, weights_only=True)
    return tensor
