"""Pictures to run verbs on, and one small finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from verbs import draw, run_verb


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two classes, dark and light, with four training and two validation pictures each."""
    root = tmp_path / "photos"
    for split, count in (("train", 4), ("val", 2)):
        for name, value in (("dark", 60), ("light", 190)):
            for number in range(count):
                draw(root / split / name / f"{number}.jpg", value + number)
    return root


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run on digits, with its plain baseline."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    done = run_verb(
        "train",
        "--method",
        "pooled_chain",
        "--last",
        4,
        "--epochs",
        2,
        "--limit",
        40,
        "--batch-size",
        20,
        "--out",
        folder,
    )
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run on digits whose layers compute with signs."""
    folder = tmp_path_factory.mktemp("runs") / "signs"
    done = run_verb("compress", "--epochs", 1, "--limit", 20, "--skip", "features.5.0", "--out", folder)
    assert done.exit_code == 0, done.output
    return folder
