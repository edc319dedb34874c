"""A record is what was written, or none: whatever happened to the file, the disk or the process meanwhile."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from edgetune.cache.store import CHECK_BYTES, DiskStore, MemoryStore, Store, room_on_disk

SIZE, RECORD = 24, 24 + CHECK_BYTES


def sample(number: int) -> torch.Tensor:
    return torch.randint(256, (SIZE,), generator=torch.Generator().manual_seed(number)).to(torch.uint8)


@pytest.fixture
def told() -> list[str]:
    return []


def disk(path: Path, told: list[str], key: str = "key", capacity: int = 10) -> DiskStore:
    return DiskStore(path / "features.cache", key, SIZE, capacity, told.append)


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path, told: list[str]) -> Store:
    return MemoryStore(10) if request.param == "memory" else disk(tmp_path, told)


class TestBoth:
    def test_samples_come_back_as_they_were(self, store: Store, told: list[str]) -> None:
        for slot in (3, 0, 9):
            assert store.read(slot) is None
            store.write(slot, sample(slot))
        assert all(torch.equal(store.read(slot), sample(slot)) for slot in (0, 3, 9))
        assert (store.read(1), store.stored, told) == (None, 3, [])

    def test_what_is_kept_does_not_follow_its_source(self, store: Store) -> None:
        x = sample(0)
        store.write(0, x)
        x.zero_()
        assert torch.equal(store.read(0), sample(0))

    def test_what_does_not_fit_is_not_kept(self, store: Store) -> None:
        store.write(10, sample(10))
        assert (store.read(10), store.stored) == (None, 0)


class TestDisk:
    def test_another_process_finds_what_was_written(self, tmp_path: Path, told: list[str]) -> None:
        first = disk(tmp_path, told)
        first.write(4, sample(4))
        first.close()
        assert torch.equal(disk(tmp_path, told).read(4), sample(4))

    def test_the_file_stays_below_its_bound(self, tmp_path: Path, told: list[str]) -> None:
        store = disk(tmp_path, told)
        for slot in range(50):
            store.write(slot, sample(slot))
        assert store.path.stat().st_size == 10 * RECORD

    @pytest.mark.parametrize("at", [0, CHECK_BYTES - 1, CHECK_BYTES, RECORD - 1])
    def test_one_wrong_bit_is_found_and_mended(self, tmp_path: Path, told: list[str], at: int) -> None:
        store = disk(tmp_path, told)
        for slot in range(3):
            store.write(slot, sample(slot))
        content = bytearray(store.path.read_bytes())
        content[RECORD + at] ^= 4
        store.path.write_bytes(content)
        again = disk(tmp_path, told)
        assert [again.read(slot) is not None for slot in range(3)] == [True, False, True]
        assert told == [f"'{store.path}' is damaged in places: what is damaged is computed and written anew"]
        again.write(1, sample(1))
        assert torch.equal(again.read(1), sample(1))

    @pytest.mark.parametrize("length", range(0, 3 * RECORD, 5))
    def test_a_file_cut_short_keeps_what_is_whole(self, tmp_path: Path, told: list[str], length: int) -> None:
        """Also what a kill in the middle of a write leaves."""
        store = disk(tmp_path, told)
        for slot in range(3):
            store.write(slot, sample(slot))
        os.truncate(store.path, length)
        again = disk(tmp_path, told)
        for slot in range(3):
            found = again.read(slot)
            assert (found is not None) == (length >= (slot + 1) * RECORD)
            again.write(slot, sample(slot))
        assert all(torch.equal(again.read(slot), sample(slot)) for slot in range(3))

    @pytest.mark.parametrize("content", [b"no cache at all" * 100, bytes(500)])
    def test_any_other_file_holds_nothing(self, tmp_path: Path, told: list[str], content: bytes) -> None:
        (tmp_path / "features.cache").write_bytes(content)
        assert all(disk(tmp_path, told).read(slot) is None for slot in range(10))

    def test_records_of_another_key_or_place_are_none(self, tmp_path: Path, told: list[str]) -> None:
        store = disk(tmp_path, told)
        store.write(0, sample(0))
        assert disk(tmp_path, told, key="another").read(0) is None
        content = store.path.read_bytes()
        store.path.write_bytes(content * 2)
        assert disk(tmp_path, told).read(1) is None

    @pytest.mark.parametrize("how", ["error", "short"])
    def test_a_full_disk_is_told_once_and_what_is_there_is_read(
        self, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        store = disk(tmp_path, told)
        store.write(0, sample(0))
        write = os.pwrite

        def full(file: int, record: bytes, place: int) -> int:
            if how == "short":
                return write(file, record[: RECORD // 2], place)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            store.write(1, sample(1))
        store.write(2, sample(2))
        assert torch.equal(store.read(0), sample(0))
        assert store.read(1) is None and store.read(2) is None
        full_disk = [text for text in told if "takes no more features" in text]
        assert len(full_disk) == 1 and str(store.path) in full_disk[0]

    def test_a_place_that_cannot_be_written_is_told(self, tmp_path: Path, told: list[str]) -> None:
        (tmp_path / "file").write_text("")
        store = DiskStore(tmp_path / "file" / "features.cache", "key", SIZE, 10, told.append)
        store.write(0, sample(0))
        assert (store.read(0), store.stored, len(told)) == (None, 0, 1)

    def test_half_of_the_free_disk_is_left_to_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        assert 0 < room_on_disk(tmp_path / "not yet" / "there" / "x") <= 0.55 * free
