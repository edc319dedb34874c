"""Pictures of every kind, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edgetune.data import Preprocess, open_picture
from edgetune.errors import DataError

PLAIN = Preprocess(size=(8, 8), resize="stretch", mean=(0.0,) * 3, std=(1.0,) * 3)


def ramp() -> np.ndarray:
    return np.linspace(0, 255, 64).reshape(8, 8).astype(np.uint8)


def reread(image: Image.Image, path: Path, preprocess: Preprocess = PLAIN) -> torch.Tensor:
    image.save(path)
    return preprocess.pixels(open_picture(path)).float()


def test_grey_is_repeated(tmp_path: Path) -> None:
    pixels = reread(Image.fromarray(ramp()), tmp_path / "a.png")
    assert pixels.shape == (3, 8, 8)
    assert torch.equal(pixels[0], pixels[2])
    assert torch.equal(pixels[0], torch.from_numpy(ramp()).float())


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    pixels = reread(Image.fromarray(ramp().astype(np.uint16) * 257), tmp_path / "a.png")
    assert torch.equal(pixels[0], torch.from_numpy(ramp()).float())


def test_floats_are_scaled(tmp_path: Path) -> None:
    pixels = reread(Image.fromarray(ramp().astype(np.float32) / 255), tmp_path / "a.tiff")
    assert torch.equal(pixels[0], torch.from_numpy(ramp()).float())


def test_cmyk_keeps_its_colours(tmp_path: Path) -> None:
    pixels = reread(Image.new("RGB", (8, 8), (200, 30, 60)).convert("CMYK"), tmp_path / "a.jpg")
    assert torch.allclose(pixels.mean((1, 2)), torch.tensor([200.0, 30.0, 60.0]), atol=6)


def test_palettes_keep_their_colours(tmp_path: Path) -> None:
    pixels = reread(Image.new("RGB", (8, 8), (200, 30, 60)).convert("P"), tmp_path / "a.gif")
    assert torch.allclose(pixels.mean((1, 2)), torch.tensor([200.0, 30.0, 60.0]), atol=26)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (8, 8), 0 if mode == "LA" else (0, 0, 0, 0))
    image.putalpha(Image.fromarray(np.where(ramp() < 128, 0, 255).astype(np.uint8)))
    pixels = reread(image, tmp_path / "a.png")
    assert bool((pixels[:, 0] == 255).all())
    assert bool((pixels[:, -1] == 0).all())


def test_grey_networks_get_one_channel(tmp_path: Path) -> None:
    one = Preprocess(size=(8, 8), resize="stretch", channels=1, mean=(0.5,), std=(0.5,))
    image = Image.new("RGB", (8, 8), (255, 255, 255))
    image.save(tmp_path / "a.png")
    assert torch.equal(one.apply(open_picture(tmp_path / "a.png")), torch.ones(1, 8, 8))


def test_a_sideways_photo_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (16, 8))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_picture(tmp_path / "a.jpg").size == (8, 16)


def test_damaged_pictures_are_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for name in ("cut.jpg", "cut.png"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=rf"{name}' is damaged .*--skip-bad-images"):
            open_picture(tmp_path / name)
    for name, content in (("empty.jpg", b""), ("text.jpg", b"no picture at all")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}' is not a picture"):
            open_picture(tmp_path / name)
    with pytest.raises(DataError, match="does not exist"):
        open_picture(tmp_path / "none.jpg")
