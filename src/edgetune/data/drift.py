"""Pictures as a different camera would see them, so that a network has something real to adapt to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from edgetune.data.chance import generator_for
from edgetune.data.settings import PHOTO_CAMERA, Camera

_CHUNK = 256


def drift(
    images: torch.Tensor,
    seed: int = 0,
    camera: Camera = PHOTO_CAMERA,
    keys: Sequence[int | str] | None = None,
) -> torch.Tensor:
    """images uint8 (n c h w) -> the same seen by `camera`, uint8 (n c h w).

    What chance decides (turn, light, noise) depends on `seed` and the picture's key alone (its index unless
    given), never on the pictures around it.
    """
    names = range(len(images)) if keys is None else keys
    parts = [
        _seen(
            images[first : first + _CHUNK],
            [generator_for("drift", seed, key) for key in names[first : first + _CHUNK]],
            camera,
        )
        for first in range(0, len(images), _CHUNK)
    ]
    return torch.cat(parts) if parts else images.clone()


def _seen(images: torch.Tensor, generators: list[torch.Generator], camera: Camera) -> torch.Tensor:
    x = images.float() / 255
    draws = torch.stack([torch.rand(2, generator=generator) for generator in generators])
    angles = camera.turn_degrees + camera.turn_spread_degrees * (2 * draws[:, 0] - 1)
    x = _turned(x, torch.deg2rad(angles))
    x = _blurred(x, camera.blur * x.shape[-2])
    x = (x - 0.5) * camera.contrast + 0.5 + camera.brightness
    x = x + camera.shade * _slopes(draws[:, 1] * 2 * math.pi, x.shape[-2], x.shape[-1])
    if camera.inverted:
        x = 1 - x
    if camera.noise:
        shape = x.shape[1:]
        x = x + camera.noise * torch.stack(
            [torch.randn(shape, generator=generator) for generator in generators]
        )
    return (x.clamp(0, 1) * 255).round().byte()


def _turned(x: torch.Tensor, radians: torch.Tensor) -> torch.Tensor:
    if not bool(radians.any()):
        return x
    cos, sin, zero = radians.cos(), radians.sin(), torch.zeros_like(radians)
    aspect = x.shape[-2] / x.shape[-1]
    rows = torch.stack(
        [torch.stack([cos, -sin * aspect, zero], 1), torch.stack([sin / aspect, cos, zero], 1)], 1
    )
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _blurred(x: torch.Tensor, sigma_px: float) -> torch.Tensor:
    if sigma_px <= 0:
        return x
    reach = max(1, math.ceil(3 * sigma_px))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma_px) ** 2)
    taps, channels = taps / taps.sum(), x.shape[1]
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    x = F.conv2d(x, taps.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(x, taps.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)


def _slopes(radians: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Light falling off across each picture, from -1/2 to 1/2: (n 1 h w)."""
    rows, columns = torch.linspace(-0.5, 0.5, height)[:, None], torch.linspace(-0.5, 0.5, width)[None, :]
    return (radians.sin()[:, None, None] * rows + radians.cos()[:, None, None] * columns)[:, None]
