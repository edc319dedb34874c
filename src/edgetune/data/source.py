"""What every source of pictures gives: names, labels and a way to open each; dividing and thinning them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from PIL import Image

from edgetune.data.chance import permutation
from edgetune.data.settings import PHOTO_CAMERA, Augment, Camera
from edgetune.errors import DataError

TRAIN, VAL, ALL = "train", "val", "all"


@dataclass(frozen=True)
class Listing:
    """Pictures not yet opened: `names` and `sizes` (bytes) identify them, `open_image` opens number i."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    labels: tuple[int, ...]
    open_image: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return len(self.names)

    def pick(self, indices: list[int]) -> Listing:
        """The pictures at `indices`, in that order."""
        return Listing(
            names=tuple(self.names[i] for i in indices),
            sizes=tuple(self.sizes[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            open_image=_through(self.open_image, tuple(indices)),
        )


def _through(
    open_image: Callable[[int], Image.Image], indices: tuple[int, ...]
) -> Callable[[int], Image.Image]:
    return lambda index: open_image(indices[index])


@dataclass(frozen=True)
class Source:
    """Pictures from one place: either `train` and `val` splits, or one split `all` yet to be divided."""

    name: str
    classes: tuple[str, ...]
    splits: dict[str, Listing]
    flips: bool = True
    camera: Camera = PHOTO_CAMERA
    drifted: bool = False

    def augment(self, size: tuple[int, int]) -> Augment:
        """Views that leave the meaning alone: crops of photos, small shifts of small pictures."""
        small = min(size) <= 64
        return Augment(
            flip=self.flips, crop_scale=1.0 if small else 0.5, shift_px=min(size) // 16 if small else 0
        )


def divide(source: Source, val_fraction: float | None, seed: int) -> Source:
    """Give the source a `train` and a `val` split; each class goes into both in proportion, by `seed`."""
    if ALL not in source.splits:
        if val_fraction is not None:
            raise DataError(
                f"data '{source.name}' has validation pictures of its own: leave --val-fraction away"
            )
        return source
    if val_fraction is None:
        raise DataError(
            f"data '{source.name}' has no validation pictures: set some aside with --val-fraction 0.2"
        )
    if not 0 < val_fraction < 1:
        raise DataError(
            f"--val-fraction {val_fraction:g} leaves nothing for one side: "
            "give a fraction between 0 and 1, such as 0.2"
        )
    whole = source.splits[ALL]
    train, val = [], []
    for label, members in _by_class(whole, len(source.classes)):
        if len(members) < 2:
            raise DataError(
                f"class '{source.classes[label]}' of '{source.name}' has one picture only, which cannot both "
                "train and validate: add pictures or remove the class"
            )
        order = permutation(len(members), "divide", seed, label)
        count = min(max(round(len(members) * val_fraction), 1), len(members) - 1)
        val += [members[i] for i in order[:count]]
        train += [members[i] for i in order[count:]]
    return replace(source, splits={TRAIN: whole.pick(sorted(train)), VAL: whole.pick(sorted(val))})


def thin(listing: Listing, limit: int | None, classes: int, seed: int) -> Listing:
    """At most `limit` pictures, as many of each class as possible, decided by `seed`."""
    if limit is None or len(listing) <= limit:
        return listing
    if limit < classes:
        raise DataError(f"a limit of {limit} pictures is less than one a class: give at least {classes}")
    ranked = [
        (rank, label, members[i])
        for label, members in _by_class(listing, classes)
        for rank, i in enumerate(permutation(len(members), "thin", seed, label))
    ]
    return listing.pick(sorted(index for _, _, index in sorted(ranked)[:limit]))


def check_classes(source: Source) -> Source:
    """Refuse a source with fewer than two classes, or a class without pictures."""
    if len(source.classes) < 2:
        raise DataError(
            f"data '{source.name}' has one class only ('{source.classes[0]}'): a classifier needs two or more"
        )
    for split, listing in source.splits.items():
        for label, members in _by_class(listing, len(source.classes)):
            if not members:
                where = "" if split == ALL else f" in {split}"
                raise DataError(
                    f"class '{source.classes[label]}' of '{source.name}' has no pictures{where}: "
                    "add some or remove the class"
                )
    return source


def _by_class(listing: Listing, classes: int) -> list[tuple[int, list[int]]]:
    members: list[list[int]] = [[] for _ in range(classes)]
    for index, label in enumerate(listing.labels):
        members[label].append(index)
    return list(enumerate(members))
