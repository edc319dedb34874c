"""scikit-learn's handwritten digits (1797 pictures of 8 x 8 pixels, from NIST forms), as a built-in data set.

797 of them are the factory's: the shipped `digits_net` was trained on those. The other 1000 are the field's,
600 to adapt with and 400 to validate on, so nothing that is measured has been seen before.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from edgetune.data.chance import permutation
from edgetune.data.settings import DIGITS_CAMERA
from edgetune.data.source import TRAIN, VAL, Listing, Source
from edgetune.errors import DataError

NAME = "digits"
DESCRIPTION = (
    "scikit-learn's handwritten digits as a different camera would see them (digits:clean: as they are)"
)

_FACTORY, _TRAIN = 797, 600
_BRIGHTEST = 16


def open_source() -> Source:
    """The field's 600 + 400 digits, drifted unless asked for clean."""
    whole = _all_digits()
    order = permutation(len(whole), "digits", 0)
    return Source(
        name=NAME,
        classes=_CLASSES,
        flips=False,
        camera=DIGITS_CAMERA,
        drifted=True,
        splits={
            TRAIN: whole.pick(order[_FACTORY : _FACTORY + _TRAIN]),
            VAL: whole.pick(order[_FACTORY + _TRAIN :]),
        },
    )


def factory_listing() -> Listing:
    """The factory's 797 digits, clean: what `digits_net` is trained on before it is shipped."""
    whole = _all_digits()
    return whole.pick(permutation(len(whole), "digits", 0)[:_FACTORY])


_CLASSES = tuple(str(digit) for digit in range(10))


def _all_digits() -> Listing:
    try:
        from sklearn.datasets import load_digits
    except ImportError as failure:
        raise DataError(
            "the built-in digits come with scikit-learn, which cannot be imported "
            f"({failure}): install it with pip install scikit-learn"
        ) from failure
    bunch = load_digits()
    images = np.rint(bunch.images * (255 / _BRIGHTEST)).astype(np.uint8)
    return Listing(
        names=tuple(f"digits/{index}" for index in range(len(images))),
        sizes=(images[0].nbytes,) * len(images),
        labels=tuple(int(label) for label in bunch.target),
        open_image=lambda index: Image.fromarray(images[index]),
    )
