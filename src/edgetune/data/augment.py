"""Random crops, shifts and flips on tensors, and batches of them, repeatable from (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from edgetune.data.chance import generator_for, permutation
from edgetune.data.dataset import Pictures
from edgetune.data.settings import Augment


def augment(x: torch.Tensor, generator: torch.Generator, settings: Augment | None = None) -> torch.Tensor:
    """One random view of a picture: x (c h w) -> (c h w). Draws from `generator` only."""
    settings = Augment() if settings is None else settings
    area, ratio, top, left, down, right, mirror = torch.rand(7, generator=generator).tolist()
    height, width = x.shape[-2:]
    if settings.crop_scale < 1:
        scale = settings.crop_scale + (1 - settings.crop_scale) * area
        stretch = (3 / 4) ** (
            ratio - 0.5
        )  # aspect within 0.87 .. 1.15, milder than ImageNet's, as scenes are small
        h = min(max(round(height * (scale * stretch) ** 0.5), 1), height)
        w = min(max(round(width * (scale / stretch) ** 0.5), 1), width)
        y0, x0 = round((height - h) * top), round((width - w) * left)
        crop = x[None, :, y0 : y0 + h, x0 : x0 + w]
        x = F.interpolate(crop, size=(height, width), mode="bilinear", align_corners=False)[0]
    if settings.shift_px:
        reach = settings.shift_px
        padded = F.pad(x[None], (reach, reach, reach, reach), mode="replicate")[0]
        y0, x0 = min(int(down * (2 * reach + 1)), 2 * reach), min(int(right * (2 * reach + 1)), 2 * reach)
        x = padded[:, y0 : y0 + height, x0 : x0 + width]
    return x.flip(-1) if settings.flip and mirror < 0.5 else x


def batches(
    pictures: Pictures,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    settings: Augment | None = None,
    shuffle: bool = True,
    start: int = 0,
    drop_last: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of one epoch: x (n c h w) float32 and y (n) int64, from batch number `start` on.

    Order and views depend on (seed, epoch, index) alone, so an interrupted epoch goes on exactly where it
    stopped. Without `settings` pictures come as they are; without `shuffle` in their own order.
    """
    order = permutation(len(pictures), "order", seed, epoch) if shuffle else list(range(len(pictures)))
    for chosen in chunks(order, batch_size, start):
        if drop_last and len(chosen) < batch_size:
            return
        x = seen(pictures, chosen, seed=seed, view=epoch, settings=settings)
        yield x, torch.tensor([pictures.labels[index] for index in chosen])


def chunks(order: list[int], batch_size: int, start: int = 0) -> Iterator[list[int]]:
    """The numbers of the pictures of each batch, from batch number `start` on; the last may be a small one."""
    for first in range(start * batch_size, len(order), batch_size):
        yield order[first : first + batch_size]


def seen(
    pictures: Pictures, chosen: Sequence[int], *, seed: int, view: int, settings: Augment | None
) -> torch.Tensor:
    """The pictures `chosen` as x (n c h w): view number `view` of each, or as they are without `settings`."""
    samples = ((index, pictures[index][0]) for index in chosen)
    return torch.stack(
        [
            x if settings is None else augment(x, generator_for("view", seed, view, index), settings)
            for index, x in samples
        ]
    )
