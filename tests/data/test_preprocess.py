"""The recipe from picture to tensor, and its way through a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from edgetune.data import Preprocess

WIDE = Image.fromarray(
    np.repeat(np.arange(40, dtype=np.uint8)[None, :, None] * 5, 20, 0).repeat(3, 2)
)  # 20 x 40


@pytest.mark.parametrize("resize", ["crop", "stretch", "fit"])
@pytest.mark.parametrize("size", [(10, 10), (7, 13), (32, 16), (1, 1)])
def test_every_rule_reaches_every_size(resize: str, size: tuple[int, int]) -> None:
    recipe = Preprocess(size=size, resize=resize)
    assert recipe.apply(WIDE).shape == (3, *size) == recipe.shape


def test_crop_takes_the_middle_and_fit_keeps_all() -> None:
    crop = Preprocess(size=(20, 20), resize="crop", crop_fraction=1.0).pixels(WIDE)
    assert torch.equal(crop[0, 0], torch.arange(10, 30, dtype=torch.uint8) * 5)
    fit = Preprocess(size=(40, 40), resize="fit").pixels(WIDE)
    assert torch.equal(fit[0, 20], torch.arange(40, dtype=torch.uint8) * 5)
    assert int(fit[:, :10].max()) == 0


@pytest.mark.parametrize(
    ("value_range", "mean", "std", "black", "white"),
    [
        ((-1.0, 1.0), 0.0, 1.0, -1.0, 1.0),
        ((0.0, 255.0), 0.0, 1.0, 0.0, 255.0),
        ((0.0, 1.0), 0.5, 0.25, -2.0, 2.0),
    ],
)
def test_values_land_where_the_network_wants_them(
    value_range: tuple[float, float], mean: float, std: float, black: float, white: float
) -> None:
    recipe = Preprocess(value_range=value_range, mean=(mean,) * 3, std=(std,) * 3)
    x = recipe.normalise(torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2).expand(3, 1, 2))
    assert torch.allclose(x[:, 0], torch.tensor([black, white]).expand(3, 2))


def test_tensorflow_range_is_exactly_theirs() -> None:
    recipe = Preprocess(value_range=(-1.0, 1.0), mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    assert torch.allclose(recipe.normalise(pixels), pixels / 127.5 - 1, atol=1e-6)


def test_it_travels_through_a_file(tmp_path: Path) -> None:
    recipe = Preprocess(size=(96, 64), channels=1, mean=(0.1,), std=(0.3,))
    recipe.save(tmp_path / "p.json")
    assert Preprocess.load(tmp_path / "p.json") == recipe


@pytest.mark.parametrize(
    "wrong",
    [
        {"resize": "wrap"},
        {"channels": 2},
        {"mean": (0.0,)},
        {"size": (0, 8)},
        {"std": (1.0, 0.0, 1.0)},
        {"crop_fraction": 0},
    ],
)
def test_nonsense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Preprocess.model_validate(wrong)
