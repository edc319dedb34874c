"""Pictures ready for training: decoded once where memory allows, and identified by a fingerprint."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.utils import data

from edgetune.data.drift import drift
from edgetune.data.preprocess import Preprocess
from edgetune.data.settings import Augment, Camera
from edgetune.data.source import Listing
from edgetune.errors import DataError

CACHE_BYTES = 512 * 2**20
"""Splits whose decoded pictures need no more than this are kept in memory."""


class Pictures(data.Dataset[tuple[torch.Tensor, int]]):
    """A map-style data set: index -> (float32 (c h w), label). `names` and `labels` list them in order."""

    def __init__(
        self, listing: Listing, preprocess: Preprocess, camera: Camera | None, cache: torch.Tensor | None
    ) -> None:
        self.names, self.labels, self.preprocess, self.camera = (
            listing.names,
            listing.labels,
            preprocess,
            camera,
        )
        self._listing, self._cache = listing, cache

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, index: int) -> torch.Tensor:
        """Picture `index` before normalisation: uint8 (c h w)."""
        if self._cache is not None:
            return self._cache[index]
        seen = self.preprocess.pixels(self._listing.open_image(index))
        return seen if self.camera is None else drift(seen[None], 0, self.camera, [self.names[index]])[0]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.preprocess.normalise(self.pixels(index)), self.labels[index]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each picture where it comes from."""
        return self._listing.sizes


@dataclass(frozen=True)
class Dataset:
    """Pictures to train and validate on, with what has to be remembered of them.

    `fingerprint` changes with names, sizes, labels, classes and drift of the pictures used, so that a resumed
    run can tell whether it still sees the same data; `skipped` names unreadable pictures left out.
    """

    source: str
    classes: tuple[str, ...]
    train: Pictures
    val: Pictures
    preprocess: Preprocess
    augment: Augment
    fingerprint: str
    skipped: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Pictures of each split."""
        return {"train": len(self.train), "val": len(self.val)}


def decode(
    listing: Listing,
    preprocess: Preprocess,
    camera: Camera | None,
    skip_bad_images: bool,
) -> tuple[Pictures, tuple[str, ...]]:
    """Open the pictures of a listing; return them with the names of those skipped.

    Small splits are decoded at once, so damage shows before training starts. Large ones are decoded when
    asked for, and then a damaged picture raises DataError at that moment, unless they are to be skipped: then
    all are tried first.
    """
    channels, height, width = preprocess.shape
    small = len(listing) * channels * height * width <= CACHE_BYTES
    if not small and not skip_bad_images:
        return Pictures(listing, preprocess, camera, None), ()

    def attempt(index: int) -> torch.Tensor | str | None:
        try:
            pixels = preprocess.pixels(listing.open_image(index))
        except DataError:
            if skip_bad_images:
                return listing.names[index]
            raise
        return pixels if small else None

    with ThreadPoolExecutor(
        min(4, os.cpu_count() or 1)
    ) as pool:  # Pillow decodes outside the interpreter lock
        outcomes = list(pool.map(attempt, range(len(listing))))
    skipped = tuple(outcome for outcome in outcomes if isinstance(outcome, str))
    kept = [index for index, outcome in enumerate(outcomes) if not isinstance(outcome, str)]
    good = listing.pick(kept) if skipped else listing
    decoded = [outcome for outcome in outcomes if isinstance(outcome, torch.Tensor)]
    cache = torch.stack(decoded) if decoded else None
    if cache is not None and camera is not None:
        cache = drift(cache, 0, camera, good.names)
    return Pictures(good, preprocess, camera, cache), skipped


def fingerprint(classes: tuple[str, ...], *splits: Pictures) -> str:
    """A short hash of what the pictures are: classes, names, sizes, labels, drift."""
    digest = hashlib.sha256(repr(classes).encode())
    for split in splits:
        camera = split.camera.model_dump_json() if split.camera else ""
        digest.update(repr((split.names, split.sizes, split.labels, camera)).encode())
    return digest.hexdigest()[:16]
