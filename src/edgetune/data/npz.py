"""Pictures in one npz file: arrays of pixels, or JPEG files one after another with their offsets.

Arrays are named x and y (also images and labels, data and target), with train_ and val_ or test_ before or
after the name where the file divides them: (n h w), (n h w c) or (n c h w) of bytes, or of floats in 0..1 or
0..255. The JPEG form has `train_jpeg` (bytes), `train_offsets` (n + 1) and `train_y`. `classes` may name the
classes.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from edgetune.data.picture import decode_picture
from edgetune.data.source import ALL, TRAIN, VAL, Listing, Source
from edgetune.errors import DataError

Array = np.ndarray
Arrays = dict[str, Array]

_IMAGE_NAMES = ("x", "X", "images", "image", "data", "jpeg")
_LABEL_NAMES = ("y", "labels", "label", "target", "targets")
_SPLIT_NAMES = {TRAIN: ("train",), VAL: ("val", "valid", "validation", "test"), ALL: ("",)}
_CLASS_NAMES = ("classes", "class_names", "label_names", "target_names")


def open_npz(path: Path) -> Source:
    """List the pictures of an npz file. Raises DataError when its keys or shapes are others."""
    arrays = _read(path)
    splits: dict[str, tuple[str, str, str]] = {}
    for split, spellings in _SPLIT_NAMES.items():
        found = next((match for spelling in spellings if (match := _keys(arrays, spelling))), None)
        if found is not None:
            splits[split] = found
    if TRAIN in splits and VAL not in splits:
        splits = {ALL: splits[TRAIN]}
    elif TRAIN in splits:
        splits.pop(ALL, None)
    elif ALL not in splits:
        raise DataError(
            f"'{path}' has the keys {', '.join(arrays) or '(none)'}: name the arrays x and y, or train_x, "
            "train_y, val_x and val_y"
        )
    else:
        splits = {ALL: splits[ALL]}
    labels = {
        split: _labels(path, label_key, arrays[label_key]) for split, (_, label_key, _) in splits.items()
    }
    classes = _classes(path, arrays, labels)
    listings = {
        split: _listing(path, arrays, image_key, offsets_key, labels[split])
        for split, (image_key, _, offsets_key) in splits.items()
    }
    return Source(
        name=str(path), classes=classes, splits=listings, flips=any(key for *_, key in splits.values())
    )


def _read(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, AttributeError) as failure:
        reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        raise DataError(
            f"'{path}' cannot be read as an npz of plain arrays ({reason}): save it again with numpy.savez"
        ) from failure


def _keys(arrays: Arrays, split: str) -> tuple[str, str, str] | None:
    """Keys of images, labels and (for JPEGs, else empty) offsets of one split."""

    def spelled(names: tuple[str, ...]) -> str | None:
        forms = [
            form for name in names for form in ((f"{split}_{name}", f"{name}_{split}") if split else (name,))
        ]
        return next((form for form in forms if form in arrays), None)

    images, labels = spelled(_IMAGE_NAMES), spelled(_LABEL_NAMES)
    if images is None or labels is None:
        return None
    offsets = spelled(("offsets",)) if "jpeg" in images else ""
    return None if offsets is None else (images, labels, offsets)


def _labels(path: Path, key: str, labels: Array) -> tuple[int, ...]:
    flat = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1 or not np.issubdtype(flat.dtype, np.number) or not np.array_equal(flat, np.floor(flat)):
        raise DataError(
            f"'{key}' of '{path}' is {labels.dtype} of shape {labels.shape}: labels must be one whole number "
            "a picture"
        )
    return tuple(int(label) for label in flat)


def _classes(path: Path, arrays: Arrays, labels: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    every = [label for part in labels.values() for label in part]
    if not every:
        raise DataError(f"'{path}' holds no pictures: save some into it")
    given = next((arrays[key] for key in _CLASS_NAMES if key in arrays), None)
    count = max(every) + 1 if given is None else len(given)
    if min(every) < 0 or max(every) >= count:
        wrong = min(every) if min(every) < 0 else max(every)
        raise DataError(
            f"'{path}' has a label {wrong} out of range: labels must run from 0 to {max(count - 1, 0)}"
        )
    if count > len(every):
        raise DataError(
            f"'{path}' has labels up to {max(every)} for {len(every)} pictures: "
            "number the classes 0, 1, 2, ..."
        )
    return (
        tuple(str(index) for index in range(count)) if given is None else tuple(str(name) for name in given)
    )


def _listing(
    path: Path, arrays: Arrays, image_key: str, offsets_key: str, labels: tuple[int, ...]
) -> Listing:
    images = arrays[image_key]
    sizes, open_image = (
        _jpegs(path, image_key, images, arrays[offsets_key])
        if offsets_key
        else _pixels(path, image_key, images)
    )
    if len(sizes) != len(labels):
        raise DataError(
            f"'{path}' has {len(sizes)} pictures in '{image_key}' but {len(labels)} labels: "
            "give one label a picture"
        )
    names = tuple(f"{image_key}[{index}]" for index in range(len(sizes)))
    return Listing(names=names, sizes=sizes, labels=labels, open_image=open_image)


Opened = tuple[tuple[int, ...], Callable[[int], Image.Image]]


def _jpegs(path: Path, key: str, content: Array, offsets: Array) -> Opened:
    steps = np.diff(offsets.astype(np.int64)) if offsets.ndim == 1 and len(offsets) > 1 else np.array([-1])
    if content.dtype != np.uint8 or content.ndim != 1 or (steps < 0).any() or offsets[-1] > len(content):
        raise DataError(
            f"the offsets of '{key}' in '{path}' do not fit its bytes: picture i must be bytes "
            "offsets[i] to offsets[i + 1]"
        )
    starts = offsets.astype(np.int64).tolist()
    return tuple(steps.tolist()), lambda i: decode_picture(
        content[starts[i] : starts[i + 1]].tobytes(), f"{path}:{key}[{i}]"
    )


def _pixels(path: Path, key: str, images: Array) -> Opened:
    if images.ndim == 4 and images.shape[-1] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        images = np.moveaxis(images, 1, -1)
    if (
        images.ndim not in (3, 4)
        or (images.ndim == 4 and images.shape[-1] not in (1, 3, 4))
        or 0 in images.shape
    ):
        raise DataError(
            f"'{key}' of '{path}' has shape {images.shape}: pictures must be (n h w), (n h w c) or (n c h w) "
            "with 1, 3 or 4 channels"
        )
    scale = _scale(path, key, images)
    size = int(images[0].nbytes)

    def open_image(index: int) -> Image.Image:
        pixels = (
            images[index] if images.dtype == np.uint8 else np.rint(images[index] * scale).astype(np.uint8)
        )
        return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))

    return (size,) * len(images), open_image


def _scale(path: Path, key: str, images: Array) -> float:
    if images.dtype == np.uint8:
        return 1.0
    if not (np.issubdtype(images.dtype, np.number) and np.isrealobj(images)):
        raise DataError(
            f"'{key}' of '{path}' holds {images.dtype}: pictures must be bytes, or floats in 0..1 or 0..255"
        )
    low, high = float(images.min()), float(images.max())
    top = 65535.0 if images.dtype == np.uint16 and high > 255 else 1.0 if high <= 1 else 255.0
    if not (low >= 0 and high <= top):  # also true of NaN
        raise DataError(
            f"'{key}' of '{path}' has values from {low:g} to {high:g}: pictures must lie in 0..1 or 0..255"
        )
    return 255.0 / top
