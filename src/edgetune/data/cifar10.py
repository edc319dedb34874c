"""CIFAR-10 as one npz of JPEGs, found through the variable EDGETUNE_DATA; nothing is downloaded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from edgetune.data.npz import open_npz
from edgetune.data.source import Source
from edgetune.errors import DataError

NAME = "cifar10"
DESCRIPTION = (
    "CIFAR-10 from $EDGETUNE_DATA/cifar10_jpeg.npz (cifar10:drift: as a cheap camera in poor light sees it)"
)


def open_source() -> Source:
    """CIFAR-10's 50 000 + 10 000 pictures of 32 x 32 pixels."""
    root = os.environ.get("EDGETUNE_DATA")
    path = Path(root or "") / "cifar10_jpeg.npz"
    if not root or not path.is_file():
        raise DataError(
            "data 'cifar10' is looked for in $EDGETUNE_DATA/cifar10_jpeg.npz, which is not there: "
            "set EDGETUNE_DATA to the folder that holds it"
        )
    return replace(open_npz(path), name=NAME)
