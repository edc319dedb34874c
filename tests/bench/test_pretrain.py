"""Teaching a network from nothing, and going on where it stopped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgetune.bench import pretrain
from edgetune.bench.photos import drifted_flowers
from edgetune.bench.pretrain import Cycle, Lesson, taught, teach
from edgetune.data import Augment, Pictures, load_data
from edgetune.models import load_model

CYCLES = (Cycle(epochs=2, peak_rate=0.1, frozen=False), Cycle(epochs=1, peak_rate=0.03, frozen=True))
DATA = Path(os.environ.get("EDGETUNE_DATA", "../shared/data"))
VIEWS = Augment(flip=False, shift_px=2)


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    lesson = Lesson(network="digits_net", size=32)
    return load_data("digits:clean", lesson.preprocess, limit=128).train


def fresh() -> nn.Module:
    torch.manual_seed(0)
    return load_model("digits_net")


def test_the_loss_falls_and_only_the_first_cycle_moves_statistics(pictures: Pictures) -> None:
    lines: list[str] = []
    model = fresh()
    teach(model, pictures, CYCLES[:1], views=VIEWS, say=lines.append)
    means = [layer.running_mean.clone() for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert any(bool(mean.any()) for mean in means) and not model.training
    teach(model, pictures, CYCLES[1:], views=VIEWS, say=lines.append)
    again = [layer.running_mean for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(torch.equal(a, b) for a, b in zip(means, again, strict=True))
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.parametrize("stops_after", [1, 2])
def test_an_interrupted_lesson_ends_where_an_uninterrupted_one_does(
    pictures: Pictures, tmp_path: Path, stops_after: int
) -> None:
    whole = fresh()
    teach(whole, pictures, CYCLES, views=VIEWS)

    class Stop(Exception):
        pass

    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) > stops_after:
            raise Stop

    checkpoint = tmp_path / "c"
    with pytest.raises(Stop):
        teach(fresh(), pictures, CYCLES, views=VIEWS, checkpoint=checkpoint, say=stop)
    resumed = load_model("digits_net")  # other weights: those of the checkpoint count
    teach(resumed, pictures, CYCLES, views=VIEWS, checkpoint=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_lesson_is_taught_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pictures: Pictures) -> None:
    class Data:
        train = pictures

    monkeypatch.setattr(pretrain.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(pretrain, "load_data", lambda *_, **__: Data)
    lesson = Lesson(network="digits_net", size=32, cycles=CYCLES[:1])
    path = taught(lesson, tmp_path)
    made = path.stat().st_mtime_ns
    assert taught(lesson, tmp_path) == path and path.stat().st_mtime_ns == made
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".lock"}


def test_a_lesson_after_another_keeps_all_but_the_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pretrain.tempfile, "gettempdir", lambda: str(tmp_path))
    first = Lesson(network="digits_net", size=32, data="digits:clean", limit=32, cycles=())
    second = Lesson(network="digits_net", size=32, data="digits:drift", limit=32, cycles=(), after=first)
    before, after = (load_file(taught(lesson, tmp_path)) for lesson in (first, second))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name.split(".")[0] for name in changed} == {"head"}


@pytest.mark.skipif(not (DATA / "flowers5_224").exists(), reason="no photos: set EDGETUNE_DATA")
def test_drifted_flowers_train_on_what_was_shown_and_test_on_all_else() -> None:
    preprocess = Lesson(network="resnet18", size=16).preprocess
    photos = drifted_flowers(DATA, preprocess, limit=50, seeds=2)
    (train, test), again = photos.splits
    assert again == (train, test) and len(train) == 50 and not set(train) & set(test)
    assert sorted(train + test) == list(range(len(photos.labels)))
    shown = load_data(DATA / "flowers5_224", preprocess, limit=50).train
    assert photos.labels[train].tolist() == list(shown.labels)
    assert not torch.equal(photos.pixels[train[0]], shown.pixels(0))
