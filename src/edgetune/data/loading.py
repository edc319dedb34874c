"""`load_data`: from what a person writes after --data to pictures ready for training."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

from edgetune.data.dataset import Dataset, Pictures, decode, fingerprint
from edgetune.data.folder import open_folder
from edgetune.data.npz import open_npz
from edgetune.data.preprocess import Preprocess
from edgetune.data.settings import Camera
from edgetune.data.source import ALL, TRAIN, VAL, Listing, Source, check_classes, divide, thin
from edgetune.errors import DataError

_VARIANTS = {":drift": True, ":clean": False}


def load_data(
    source: str | Path,
    preprocess: Preprocess,
    *,
    val_fraction: float | None = None,
    seed: int = 0,
    skip_bad_images: bool = False,
    limit: int | None = None,
) -> Dataset:
    """Pictures to train and validate on.

    `source` is an image folder, an npz file or a built-in name (`list_data()`), with `:drift` after it to see
    them through another camera. `val_fraction` divides a source that has no validation pictures of its own,
    by `seed`; `limit` caps the pictures of each split. Raises DataError naming what cannot be used and what
    to do.
    """
    found = divide(check_classes(open_source(source)), val_fraction, seed)
    camera = found.camera if found.drifted else None
    splits: dict[str, Pictures] = {}
    skipped: tuple[str, ...] = ()
    for split in (TRAIN, VAL):
        listing = thin(found.splits[split], limit, len(found.classes), seed)
        splits[split], bad = _decoded(found, listing, preprocess, camera, skip_bad_images)
        skipped += bad
    return Dataset(
        source=str(source),
        classes=found.classes,
        train=splits[TRAIN],
        val=splits[VAL],
        preprocess=preprocess,
        augment=found.augment(preprocess.size),
        skipped=skipped,
        fingerprint=fingerprint(found.classes, splits[TRAIN], splits[VAL]),
    )


def load_eval(
    source: str | Path,
    preprocess: Preprocess,
    classes: tuple[str, ...],
    *,
    skip_bad_images: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> tuple[Pictures, tuple[str, ...]]:
    """Pictures to evaluate a trained network with `classes` on, and the names of those skipped.

    The validation split where the source has one, else all of it. Classes are matched by name and may be
    fewer than the network's; one it does not know raises DataError.
    """
    found = open_source(source)
    listing = found.splits[VAL if VAL in found.splits else ALL]
    present = sorted(set(listing.labels))
    if not present:
        raise DataError(f"data '{source}' has no pictures: add some in one folder per class")
    if strangers := [found.classes[label] for label in present if found.classes[label] not in classes]:
        raise DataError(
            f"class '{strangers[0]}' of '{source}' is unknown to the network: it tells apart "
            f"{', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}"
        )
    listing = replace(listing, labels=tuple(classes.index(found.classes[label]) for label in listing.labels))
    listing = listing if limit is None else thin(listing, limit, len(classes), seed)
    return _decoded(found, listing, preprocess, found.camera if found.drifted else None, skip_bad_images)


def list_data() -> dict[str, str]:
    """Names and descriptions of the built-in data."""
    return {name: description for name, (description, _) in _builtin().items()}


def open_source(source: str | Path) -> Source:
    """List the pictures of a folder, a file or a built-in name. Raises DataError when there is none."""
    text = str(source)
    suffix = next((variant for variant in _VARIANTS if text.endswith(variant)), "")
    bare = text.removesuffix(suffix)
    path, builtin = Path(bare), _builtin()
    if bare in builtin:
        found = builtin[bare][1]()
    elif path.is_dir():
        found = open_folder(path)
    elif path.is_file() and path.suffix == ".npz":
        found = open_npz(path)
    elif path.is_file():
        raise DataError(
            f"data '{source}' is a file that cannot be used: give an npz file, or a folder of class folders"
        )
    else:
        near = difflib.get_close_matches(bare, builtin, n=1)
        hint = (
            f"did you mean '{near[0]}'?"
            if near
            else "give an image folder, an npz file, or one of " + ", ".join(builtin)
        )
        raise DataError(f"data '{source}' does not exist: {hint}")
    return replace(found, drifted=_VARIANTS.get(suffix, found.drifted))


@cache
def _builtin() -> dict[str, tuple[str, Callable[[], Source]]]:
    """Every file of this folder with a NAME is a built-in source."""
    found: dict[str, tuple[str, Callable[[], Source]]] = {}
    for entry in pkgutil.iter_modules(importlib.import_module("edgetune.data").__path__):
        module = importlib.import_module(f"edgetune.data.{entry.name}")
        if hasattr(module, "NAME"):
            found[module.NAME] = (module.DESCRIPTION, module.open_source)
    return found


def _decoded(
    source: Source, listing: Listing, preprocess: Preprocess, camera: Camera | None, skip_bad_images: bool
) -> tuple[Pictures, tuple[str, ...]]:
    pictures, skipped = decode(listing, preprocess, camera, skip_bad_images)
    lost = set(listing.labels) - set(pictures.labels)
    if lost:
        raise DataError(
            f"class '{source.classes[min(lost)]}' of '{source.name}' has no readable pictures left: "
            "mend them, add some or remove the class"
        )
    return pictures, skipped
