"""From a picture to what a network wants: a recipe that travels with the weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from pydantic import model_validator

from edgetune.data.picture import flat_colours, grey
from edgetune.record import Record

Size = tuple[int, int]


def _stretch(image: Image.Image, size: Size, _: float) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _crop(image: Image.Image, size: Size, fraction: float) -> Image.Image:
    scale = max(size[0] / fraction / image.height, size[1] / fraction / image.width)
    width, height = max(round(image.width * scale), size[1]), max(round(image.height * scale), size[0])
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size[1]) // 2, (height - size[0]) // 2
    return image.crop((left, top, left + size[1], top + size[0]))


def _fit(image: Image.Image, size: Size, _: float) -> Image.Image:
    scale = min(size[0] / image.height, size[1] / image.width)
    small = image.resize(
        (max(round(image.width * scale), 1), max(round(image.height * scale), 1)), Image.Resampling.BILINEAR
    )
    canvas = Image.new(image.mode, (size[1], size[0]))
    canvas.paste(small, ((size[1] - small.width) // 2, (size[0] - small.height) // 2))
    return canvas


RESIZES: dict[str, Callable[[Image.Image, Size, float], Image.Image]] = {
    "crop": _crop,
    "stretch": _stretch,
    "fit": _fit,
}
"""Ways to reach a size: the middle of the picture, all of it distorted, or all of it with black bars."""


class Preprocess(Record):
    """How a picture becomes a tensor.

    `size` is (height, width) in pixels; `resize` one of `RESIZES`, where "crop" first scales the picture so
    that `size` covers `crop_fraction` of it. Pixels 0..255 go to `value_range`, then `mean` is subtracted and
    `std` divides, per channel. `channels` is 3 (RGB) or 1 (grey).
    """

    size: Size = (224, 224)
    resize: str = "crop"
    crop_fraction: float = 0.875
    channels: int = 3
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _consistent(self) -> Preprocess:
        if self.resize not in RESIZES:
            raise ValueError(f"resize is '{self.resize}': choose one of {', '.join(RESIZES)}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}: pictures have 1 or 3")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mean and std need {self.channels} values each, one a channel")
        if min(self.size) < 1 or not 0 < self.crop_fraction <= 1 or min(self.std) <= 0:
            raise ValueError("size and std must be positive, and crop_fraction lie above 0 and at most at 1")
        return self

    @classmethod
    def from_input(cls, spec: Record) -> Preprocess:
        """The recipe that a network's card states (`ModelCard.input`)."""
        return cls.model_validate(spec.model_dump())

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one picture: (c, h, w)."""
        return (self.channels, *self.size)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """A picture of any mode at the right size and channels: uint8 (c h w)."""
        plain = (flat_colours if self.channels == 3 else grey)(image)
        array = np.array(RESIZES[self.resize](plain, self.size, self.crop_fraction))
        return torch.from_numpy(array.reshape(*self.size, self.channels)).permute(2, 0, 1).contiguous()

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (... c h w) -> float32 of the same shape, in the range the network was trained on."""
        low, high = self.value_range
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return (pixels.float() * ((high - low) / 255.0) + low - mean) / std

    def apply(self, image: Image.Image) -> torch.Tensor:
        """A picture of any mode -> float32 (c h w)."""
        return self.normalise(self.pixels(image))
