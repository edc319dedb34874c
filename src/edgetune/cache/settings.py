"""What a person says of the cache, and what came of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from edgetune.codecs import FIXED
from edgetune.record import Record
from edgetune.units import GIB


class Cache(Record):
    """Keep what the frozen part of a network gives, so that later epochs run the rest alone.

    It stays in memory, or on disk in `folder` (None: in the run's own folder, until the run has finished), written
    by `codec`, in at most `size_bytes`; what does not fit is computed each time. With random views a picture has
    `views` of them: epoch e shows view e modulo `views`. Pictures to validate are kept as float32.
    """

    keep: Literal["memory", "disk"] = "memory"
    codec: str = "float32"
    size_bytes: int = Field(default=GIB, gt=0)
    views: int = Field(default=4, ge=1)
    folder: str | None = None

    @field_validator("codec")
    @classmethod
    def _known(cls, codec: str) -> str:
        if codec not in FIXED:
            raise ValueError(f"choose one of {', '.join(FIXED)}")
        return codec


class CacheUse(Record):
    """What a cache did: `layers` end the frozen part, `found` pictures came from the cache, `computed` did not.

    `stored` samples (a picture's views count apart) of `sample_bytes` each are kept, and of pictures to validate
    `validation_bytes`.
    """

    layers: tuple[str, ...]
    sample_bytes: int
    stored: int = 0
    found: int = 0
    computed: int = 0
    validation_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        """Bytes of all that is kept."""
        return self.stored * self.sample_bytes + self.validation_bytes

    @property
    def hit_rate(self) -> float:
        """Share of the pictures, over all steps, that were found in the cache: 0..1."""
        return self.found / max(self.found + self.computed, 1)
