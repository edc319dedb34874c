"""From what stands after --data to pictures: every shape of source, every refusal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from edgetune.data import Preprocess, dataset, list_data, load_data, load_eval
from edgetune.errors import DataError

TINY = Preprocess(size=(8, 8), resize="stretch", mean=(0.0,) * 3, std=(1.0,) * 3)


def make_folder(root: Path, counts: dict[str, int]) -> Path:
    """`counts` maps a folder such as "train/cat" to how many pictures it gets, each of another shade."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (12, 9), (index, len(folder), 7)).save(root / folder / f"{index:02}.png")
    return root


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def test_train_and_val_folders(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"train/cat": 3, "train/dog": 2, "val/cat": 1, "val/dog": 2})
    data = load_data(root, TINY)
    assert data.classes == ("cat", "dog")
    assert data.counts == {"train": 5, "val": 3}
    assert data.train.labels == (0, 0, 0, 1, 1)
    x, y = data.train[4]
    assert x.shape == (3, 8, 8)
    assert x.dtype == torch.float32
    assert y == 1
    assert torch.allclose(x[:, 0, 0] * 255, torch.tensor([1.0, 9.0, 7.0]))
    assert data.augment.flip


def test_one_folder_is_divided_in_proportion_and_by_seed(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"cat": 10, "dog": 5, "emu": 2})
    data = load_data(root, TINY, val_fraction=0.2, seed=1)
    assert data.counts == {"train": 13, "val": 4}
    assert sorted(data.val.labels) == [0, 0, 1, 2]
    assert not set(data.train.names) & set(data.val.names)
    again, other = (load_data(root, TINY, val_fraction=0.2, seed=seed) for seed in (1, 2))
    assert again.val.names == data.val.names
    assert again.fingerprint == data.fingerprint
    assert other.val.names != data.val.names


def test_the_fingerprint_follows_the_data(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    first = load_data(root, TINY).fingerprint
    assert load_data(f"{root}:drift", TINY).fingerprint != first
    Image.new("RGB", (64, 64)).save(root / "train/a/01.png")
    assert load_data(root, TINY).fingerprint != first


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, "is empty"),
        ({"cat": 2}, "one class only"),
        ({"cat": 2, "dog": 0}, "class 'dog' of .* has no pictures:"),
        ({"cat": 3, "dog": 1}, "class 'dog' of .* has one picture only"),
        (
            {"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/dog": 0},
            "class 'dog' of .* has no pictures in val",
        ),
        ({"train/cat": 1, "train/dog": 0, "val/cat": 1}, "class 'dog' of .* has no pictures in train"),
        ({"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/owl": 1}, "class 'owl' stands in"),
        ({"train": 2}, "holds pictures but no class folders"),
        ({"val/cat": 1, "val/dog": 1}, "has 'val' but no 'train'"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, counts: dict[str, int], words: str) -> None:
    root = make_folder(tmp_path / "pictures", counts) if counts else tmp_path
    has_val = any(folder.startswith("val") for folder in counts)
    with pytest.raises(DataError, match=words) as refusal:
        load_data(root, TINY, val_fraction=None if has_val else 0.5)
    assert "\n" not in str(refusal.value)


def test_the_division_is_asked_for_when_needed_and_only_then(tmp_path: Path) -> None:
    undivided = make_folder(tmp_path / "u", {"cat": 2, "dog": 2})
    divided = make_folder(tmp_path / "d", {"train/cat": 1, "train/dog": 1, "val/cat": 1, "val/dog": 1})
    with pytest.raises(DataError, match=r"--val-fraction 0.2"):
        load_data(undivided, TINY)
    with pytest.raises(DataError, match="leave --val-fraction away"):
        load_data(divided, TINY, val_fraction=0.2)
    for fraction in (0.0, 1.0, 7.0):
        with pytest.raises(DataError, match="between 0 and 1"):
            load_data(undivided, TINY, val_fraction=fraction)


def test_damaged_pictures_are_named_or_skipped_and_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"train/cat": 3, "train/dog": 3, "val/cat": 2, "val/dog": 1})
    damage(root / "train/dog/01.png")
    with pytest.raises(DataError, match=r"dog/01\.png"):
        load_data(root, TINY)
    data = load_data(root, TINY, skip_bad_images=True)
    assert data.skipped == ("dog/01.png",)
    assert data.counts == {"train": 5, "val": 3}
    assert data.train.labels == (0, 0, 0, 1, 1)
    assert torch.equal(data.train.pixels(4)[0, 0, 0], torch.tensor(2, dtype=torch.uint8))
    damage(root / "val/dog/00.png")
    with pytest.raises(DataError, match=r"class 'dog' of .* has no readable pictures left"):
        load_data(root, TINY, skip_bad_images=True)


def test_without_room_to_cache_pictures_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path, {"train/cat": 3, "train/dog": 3, "val/cat": 1, "val/dog": 1})
    cached = load_data(f"{root}:drift", TINY)
    monkeypatch.setattr(dataset, "CACHE_BYTES", 0)
    lazy = load_data(f"{root}:drift", TINY)
    assert lazy.fingerprint == cached.fingerprint
    for index in range(6):
        assert torch.equal(lazy.train[index][0], cached.train[index][0])
    damage(root / "train/dog/01.png")
    with pytest.raises(DataError, match=r"dog/01\.png"):
        load_data(root, TINY).train[4]
    assert load_data(root, TINY, skip_bad_images=True).skipped == ("dog/01.png",)


def test_a_limit_keeps_classes_even(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"train/cat": 9, "train/dog": 4, "val/cat": 1, "val/dog": 1})
    labels = load_data(root, TINY, limit=6).train.labels
    assert sorted(labels) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(DataError, match="at least 2"):
        load_data(root, TINY, limit=1)


def save_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


X = np.arange(6 * 8 * 8 * 3, dtype=np.uint8).reshape(6, 8, 8, 3)
Y = np.array([0, 1, 0, 1, 0, 1])


@pytest.mark.parametrize(
    "images",
    [X, X.transpose(0, 3, 1, 2), X.astype(np.float32) / 255, X.astype(np.float64), X.astype(np.int64)],
    ids=["nhwc", "nchw", "0..1", "0..255", "int64"],
)
@pytest.mark.parametrize(("x", "y"), [("x", "y"), ("images", "labels"), ("data", "target")])
def test_npz_of_pixels(tmp_path: Path, images: np.ndarray, x: str, y: str) -> None:
    path = save_npz(tmp_path / "a.npz", **{x: images, y: Y[:, None]})
    data = load_data(path, TINY, val_fraction=0.34)
    assert data.classes == ("0", "1")
    assert data.counts == {"train": 4, "val": 2}
    for index, name in enumerate(data.train.names):
        row = int(name.split("[")[1][:-1])
        assert torch.equal(data.train.pixels(index), torch.from_numpy(X[row]).permute(2, 0, 1))


@pytest.mark.parametrize("form", ["{s}_{k}", "{k}_{s}"])
@pytest.mark.parametrize("val", ["val", "test"])
def test_npz_with_splits_and_class_names(tmp_path: Path, form: str, val: str) -> None:
    arrays = {form.format(s=s, k=k): a for s in ("train", val) for k, a in (("x", X[..., 0]), ("y", Y))}
    data = load_data(save_npz(tmp_path / "a.npz", classes=np.array(["cat", "dog"]), **arrays), TINY)
    assert data.classes == ("cat", "dog")
    assert data.counts == {"train": 6, "val": 6}


def jpegs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """JPEG files one after another, and their offsets."""
    files = []
    for index in range(count):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (40 * index, 9, 9)).save(file, "JPEG")
        files.append(file.getvalue())
    return np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])


def test_npz_of_jpegs(tmp_path: Path) -> None:
    content, offsets = jpegs(6)
    splits = {
        f"{s}_{k}": a
        for s in ("train", "test")
        for k, a in (("jpeg", content), ("offsets", offsets), ("y", Y))
    }
    data = load_data(save_npz(tmp_path / "a.npz", **splits), TINY)
    assert data.counts == {"train": 6, "val": 6}
    assert abs(int(data.train.pixels(5)[0, 4, 4]) - 200) < 4
    broken = content.copy()
    broken[offsets[2] : offsets[3]] = 0
    path = save_npz(tmp_path / "b.npz", **{**splits, "train_jpeg": broken})
    with pytest.raises(DataError, match=r"train_jpeg\[2\]"):
        load_data(path, TINY)
    assert load_data(path, TINY, skip_bad_images=True).skipped == ("train_jpeg[2]",)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": X, "b": Y}, "has the keys a, b: name the arrays x and y"),
        ({"x": X}, "has the keys x"),
        ({"x": X, "y": Y[:5]}, "6 pictures in 'x' but 5 labels"),
        ({"x": X.reshape(6, -1), "y": Y}, r"has shape \(6, 192\)"),
        ({"x": X[..., :2], "y": Y}, r"has shape"),
        ({"x": X[:0], "y": Y[:0]}, "holds no pictures"),
        ({"x": X, "y": Y - 1}, "label -1 out of range"),
        ({"x": X, "y": Y, "classes": np.array(["a"])}, "label 1 out of range"),
        ({"x": X, "y": Y * 999}, "labels up to 999"),
        ({"x": X, "y": Y + 1}, "class '0' of .* has no pictures"),
        ({"x": X, "y": Y * 0.5}, "one whole number"),
        ({"x": X, "y": np.array(list("ababab"))}, "one whole number"),
        ({"x": X.astype(float) * 2, "y": Y}, "values from 0 to 510"),
        ({"x": X * np.nan, "y": Y}, "values from nan"),
        ({"x": X - 3.0, "y": Y}, "values from -3"),
        (
            {"train_jpeg": X.reshape(-1), "train_offsets": np.array([0, 9, 4, 5, 6, 7, 8]), "train_y": Y},
            "offsets",
        ),
        ({"train_jpeg": X.reshape(-1), "train_offsets": np.array([0, 10**9]), "train_y": Y[:2]}, "offsets"),
        ({"x": X, "y": Y * 0}, "one class only"),
    ],
)
def test_npz_files_that_cannot_be_used(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_data(save_npz(tmp_path / "a.npz", **arrays), TINY, val_fraction=0.5)


def test_files_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="cannot be read as an npz"):
        load_data(tmp_path / "a.npz", TINY)
    np.savez(tmp_path / "b.npz", x=np.array([{}], dtype=object), y=Y)
    with pytest.raises(DataError, match="cannot be read as an npz"):
        load_data(tmp_path / "b.npz", TINY)
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match="give an npz file, or a folder"):
        load_data(tmp_path / "a.zip", TINY)
    with pytest.raises(DataError, match="does not exist: did you mean 'digits'"):
        load_data("digit", TINY)
    with pytest.raises(DataError, match="does not exist: give an image folder"):
        load_data(tmp_path / "nowhere", TINY)


def test_built_in_digits() -> None:
    grey = Preprocess(size=(32, 32), resize="stretch", channels=1, mean=(0.5,), std=(0.5,))
    assert {"digits", "cifar10"} <= list_data().keys()
    drifted, clean, again = (load_data(name, grey) for name in ("digits", "digits:clean", "digits"))
    assert drifted.counts == clean.counts == {"train": 600, "val": 400}
    assert len(drifted.classes) == 10
    assert drifted.train.names == clean.train.names
    assert not set(drifted.train.names) & set(drifted.val.names)
    assert not drifted.augment.flip
    assert torch.equal(drifted.val[3][0], again.val[3][0])
    assert not torch.equal(drifted.val[3][0], clean.val[3][0])
    assert drifted.fingerprint == again.fingerprint != clean.fingerprint


def test_the_factory_never_saw_the_fields_digits() -> None:
    from edgetune.data.digits import factory_listing, open_source

    field = {name for listing in open_source().splits.values() for name in listing.names}
    assert not field & set(factory_listing().names)
    assert len(field) + len(factory_listing()) == 1797


def test_cifar10_says_where_it_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGETUNE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="EDGETUNE_DATA"):
        load_data("cifar10", TINY)
    content, offsets = jpegs(6)
    np.savez(
        tmp_path / "cifar10_jpeg.npz",
        **{
            f"{s}_{k}": a
            for s in ("train", "test")
            for k, a in (("jpeg", content), ("offsets", offsets), ("y", Y))
        },
    )
    assert load_data("cifar10", TINY).counts == {"train": 6, "val": 6}


def test_evaluation_matches_classes_by_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", {"dog": 2, "emu": 1})
    pictures, skipped = load_eval(root, TINY, ("ant", "dog", "emu"))
    assert pictures.labels == (1, 1, 2)
    assert skipped == ()
    with pytest.raises(DataError, match=r"class 'emu' of .* is unknown to the network"):
        load_eval(root, TINY, ("ant", "dog"))
    split = make_folder(tmp_path / "b", {"train/dog": 3, "train/emu": 3, "val/dog": 1, "val/emu": 1})
    assert len(load_eval(split, TINY, ("dog", "emu"))[0]) == 2
