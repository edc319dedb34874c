"""What every test shares: fixed seeds, a plain terminal, the shared pictures where there are any."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: more threads would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

os.environ.update(COLUMNS="110", NO_COLOR="1", TERM="dumb")  # tables and help read the same everywhere

hypothesis.settings.register_profile("edgetune", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("edgetune")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in every run and in any order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order, so that equal runs are equal to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("weights/x.safetensors")` is that file below EDGETUNE_DATA; without it the test is skipped."""
    folder = Path(os.environ.get("EDGETUNE_DATA", ROOT.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"needs {name} below EDGETUNE_DATA, which is not there")
        return folder / name

    return find
