"""Drift, augmentation and batches: bounded, and repeatable from their keys alone."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch

from edgetune.data import Augment, Camera, Preprocess, augment, batches, drift, generator_for, load_data

GREY = Preprocess(size=(32, 32), resize="stretch", channels=1, mean=(0.5,), std=(0.5,))
IMAGES = torch.randint(0, 256, (5, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_drift_of_a_picture_does_not_depend_on_its_company() -> None:
    together, alone = drift(IMAGES, 3), drift(IMAGES[2:3], 3, keys=[2])
    assert together.dtype == torch.uint8
    assert together.shape == IMAGES.shape
    assert torch.equal(together[2], alone[0])
    assert not torch.equal(drift(IMAGES, 4), together)
    assert drift(IMAGES[:0]).shape == (0, 3, 16, 24)


def test_a_perfect_camera_changes_nothing() -> None:
    assert torch.equal(drift(IMAGES, 0, Camera()), IMAGES)


def test_each_fault_does_what_it_says() -> None:
    x = IMAGES.float()
    assert torch.equal(drift(IMAGES, 0, Camera(inverted=True)), 255 - IMAGES)
    half = drift(IMAGES, 0, Camera(contrast=0.5)).float()
    assert torch.allclose(half, (x - 127.5) / 2 + 127.5, atol=0.51)
    lifted = drift(IMAGES, 0, Camera(brightness=0.1)).float()
    assert torch.allclose(lifted, (x + 25.5).clamp(max=255), atol=0.51)
    blurred = drift(IMAGES, 0, Camera(blur=0.1)).float()
    assert float(blurred.var()) < float(x.var()) / 3
    assert abs(float(blurred.mean() - x.mean())) < 3
    flat = torch.full((4, 1, 33, 33), 128, dtype=torch.uint8)
    noisy = drift(flat, 0, Camera(noise=0.1)).float()
    assert abs(float(noisy.std()) - 25.5) < 1
    shaded = drift(flat, 0, Camera(shade=0.4)).float()
    assert float(shaded[:, 0, 16, 16].sub(128).abs().max()) <= 1
    assert float(shaded.amax((1, 2, 3)).min()) > 128 + 0.4 * 255 / 2 - 3


def test_a_quarter_turn_is_exact() -> None:
    square = IMAGES[:, :, :16, :16]
    turned = drift(square, 0, Camera(turn_degrees=90.0))
    assert min(int((turned.int() - square.rot90(k, (2, 3)).int()).abs().max()) for k in (1, 3)) <= 1


def test_keys_make_the_generator() -> None:
    def draw(*keys: int | str) -> float:
        return float(torch.rand(1, generator=generator_for(*keys)))

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(12), draw(2, 1), draw("1", 2), draw(1, 2, 0)}) == 5


@pytest.mark.parametrize(
    "settings",
    [
        Augment(),
        Augment(flip=False, shift_px=3),
        Augment(crop_scale=0.3),
        Augment(crop_scale=0.5, shift_px=2),
    ],
)
def test_views_keep_shape_and_range_and_repeat(settings: Augment) -> None:
    x = torch.randn(3, 17, 23)
    views = [augment(x, generator_for(0, 0, index), settings) for index in range(20)]
    for index, view in enumerate(views):
        assert view.shape == x.shape
        assert float(view.max()) <= float(x.max())
        assert float(view.min()) >= float(x.min())
        assert torch.equal(view, augment(x, generator_for(0, 0, index), settings))
    assert len({float(view[0, 3, 3]) for view in views}) > 1


def test_flips_happen_half_of_the_time_or_never() -> None:
    x = torch.arange(4.0).view(1, 1, 4)
    flipped = sum(bool(augment(x, generator_for(index), Augment())[0, 0, 0] == 3) for index in range(400))
    assert abs(flipped - 200) < 3 * math.sqrt(100)
    assert all(torch.equal(augment(x, generator_for(i), Augment(flip=False)), x) for i in range(20))


def test_shifts_reach_as_far_as_they_say() -> None:
    x = torch.zeros(1, 9, 9)
    x[0, 4, 4] = 1
    places = {
        tuple(augment(x, generator_for(i), Augment(flip=False, shift_px=2)).nonzero()[0].tolist())
        for i in range(400)
    }
    assert places == {(0, r, c) for r in range(2, 7) for c in range(2, 7)}


def test_an_interrupted_epoch_goes_on_exactly() -> None:
    data = load_data("digits", GREY, limit=50)
    whole = list(batches(data.train, 16, seed=5, epoch=2, settings=data.augment))
    torch.manual_seed(99)
    rest = list(batches(data.train, 16, seed=5, epoch=2, settings=data.augment, start=2))
    assert [len(y) for _, y in whole] == [16, 16, 16, 2]
    for (x, y), (x2, y2) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_epochs_and_seeds_differ_and_every_picture_comes_once() -> None:
    data = load_data("digits", GREY, limit=50)

    def first(seed: int, epoch: int) -> torch.Tensor:
        return next(batches(data.train, 16, seed=seed, epoch=epoch))[0]

    assert not torch.equal(first(0, 0), first(0, 1))
    assert not torch.equal(first(0, 0), first(1, 0))
    labels = torch.cat([y for _, y in batches(data.train, 16)])
    assert sorted(labels.tolist()) == sorted(data.train.labels)
    plain = torch.cat([y for _, y in batches(data.train, 16, shuffle=False)])
    assert plain.tolist() == list(data.train.labels)
    assert sum(1 for _ in batches(data.train, 16, drop_last=True)) == 3
    assert next(islice(batches(data.train, 50, shuffle=False), 1))[0].shape == (50, 1, 32, 32)
