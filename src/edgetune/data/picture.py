"""Opening pictures of every kind that cameras and people make, or saying which one cannot be opened."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from edgetune.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

WAY_OUT = "mend or remove it, or skip such pictures with --skip-bad-images"


def open_picture(path: str | Path) -> Image.Image:
    """Open and decode a picture file, turned upright. Raises DataError naming one that is damaged."""
    try:
        with open(path, "rb") as file:
            return _decode(file, str(path))
    except FileNotFoundError as failure:
        raise DataError(f"picture '{path}' does not exist: check its path") from failure
    except OSError as failure:
        raise DataError(
            f"picture '{path}' cannot be opened ({failure.strerror or failure}): {WAY_OUT}"
        ) from failure


def decode_picture(content: bytes, name: str) -> Image.Image:
    """Decode a picture from memory; `name` is used when it has to be refused with DataError."""
    return _decode(io.BytesIO(content), name)


def _decode(file: BinaryIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return ImageOps.exif_transpose(image) if image.getexif() else image.copy()
    except UnidentifiedImageError as failure:
        raise DataError(f"'{name}' is not a picture that can be read: {WAY_OUT}") from failure
    except Exception as failure:  # damaged files reach Pillow's parsers, which raise nearly anything
        raise DataError(f"picture '{name}' is damaged ({failure}): {WAY_OUT}") from failure


def flat_colours(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: grey repeated, CMYK and palettes converted, 16 bits scaled, alpha laid on white."""
    if image.mode == "RGB":
        return image
    image = _eight_bits(image)
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def grey(image: Image.Image) -> Image.Image:
    """Any mode -> 8-bit grey."""
    return image if image.mode == "L" else flat_colours(image).convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips deep greys at 255 instead of scaling them; scale by the depth they were stored in."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image, dtype=np.float64)
    top = float(values.max(initial=0.0))
    full = (
        1.0
        if image.mode == "F" and top <= 1.0
        else 255.0
        if image.mode in ("F", "I") and top <= 255.0
        else 65535.0
    )
    return Image.fromarray(np.clip(np.rint(values * (255.0 / full)), 0, 255).astype(np.uint8))
