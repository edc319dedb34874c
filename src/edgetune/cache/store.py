"""Where encoded samples stay: in memory, or in a file whose every record proves itself.

A record is a number (4 bytes) and the sample's bytes. The number is a checksum of the sample, of its place and of
what the cache is for, so a record that was cut short, damaged, moved or meant for something else is no record.
There is nothing else in the file, and nothing that a kill could leave half done.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

CHECK_BYTES = 4


class Store(Protocol):
    """Samples of one size by slot number; those from number `capacity` on are not kept."""

    capacity: int

    @property
    def stored(self) -> int:
        """How many samples are known to be kept."""
        ...

    def read(self, slot: int) -> torch.Tensor | None:
        """uint8 (size) as it was written, or None."""
        ...

    def write(self, slot: int, sample: torch.Tensor) -> None:
        """Keep uint8 (size), if it fits."""
        ...

    def close(self) -> None:
        """Nothing is read or written any more."""
        ...


class MemoryStore:
    """Samples in memory, the first `capacity` slots of them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._samples: dict[int, torch.Tensor] = {}

    @property
    def stored(self) -> int:
        """How many samples are kept."""
        return len(self._samples)

    def read(self, slot: int) -> torch.Tensor | None:
        return self._samples.get(slot)

    def write(self, slot: int, sample: torch.Tensor) -> None:
        if slot < self.capacity:
            self._samples[slot] = sample.cpu().clone()

    def close(self) -> None:
        self._samples.clear()


class DiskStore:
    """Samples of `size` bytes in the file `path`, made for `key`; `tell` hears once of damage and of a full disk."""

    def __init__(self, path: Path, key: str, size: int, capacity: int, tell: Callable[[str], None]) -> None:
        self.path, self.size, self.capacity, self.tell = path, size, capacity, tell
        self._seed = zlib.crc32(key.encode())
        self._good: set[int] = set()
        self._told_damage = self._full = False
        self._file: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as failure:
            self._give_up(failure)

    @property
    def stored(self) -> int:
        """How many samples were found or written since the file was opened."""
        return len(self._good)

    def read(self, slot: int) -> torch.Tensor | None:
        if self._file is None or slot >= self.capacity:
            return None
        try:
            record = bytearray(os.pread(self._file, CHECK_BYTES + self.size, self._place(slot)))
        except OSError:
            record = bytearray(CHECK_BYTES)
        check = int.from_bytes(record[:CHECK_BYTES], "little")
        if check == 0:  # never written, or behind the end of the file
            return None
        if len(record) < CHECK_BYTES + self.size or check != self._check(slot, memoryview(record)[CHECK_BYTES:]):
            self._good.discard(slot)
            self._damaged()
            return None
        self._good.add(slot)
        return torch.frombuffer(record, dtype=torch.uint8, offset=CHECK_BYTES)

    def write(self, slot: int, sample: torch.Tensor) -> None:
        if self._file is None or self._full or slot >= self.capacity:
            return
        content = sample.cpu().numpy().tobytes()
        record = self._check(slot, content).to_bytes(CHECK_BYTES, "little") + content
        try:
            if os.pwrite(self._file, record, self._place(slot)) < len(record):
                raise OSError("the record was cut short")
        except OSError as failure:
            self._give_up(failure)
        else:
            self._good.add(slot)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _place(self, slot: int) -> int:
        return slot * (CHECK_BYTES + self.size)

    def _check(self, slot: int, content: bytes | memoryview) -> int:
        """Never 0, which stands for a record that was never written."""
        return zlib.crc32(content, zlib.crc32(slot.to_bytes(8, "little"), self._seed)) or 1

    def _damaged(self) -> None:
        if not self._told_damage:
            self._told_damage = True
            self.tell(f"'{self.path}' is damaged in places: what is damaged is computed and written anew")

    def _give_up(self, failure: OSError) -> None:
        self._full = True
        self.tell(
            f"'{self.path}' takes no more features ({failure.strerror or failure}): what it does not hold is computed"
        )


def room_on_disk(path: Path) -> int:
    """Bytes that a cache at `path` may take: half of what is free and of what it has, so that others can write."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    own = path.stat().st_blocks * 512 if path.exists() else 0
    return (shutil.disk_usage(folder).free + own) // 2
