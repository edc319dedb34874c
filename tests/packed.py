"""Looking at an arena."""

from __future__ import annotations

import itertools

from edgetune.quantize.packing import Arena


def overlapping(arena: Arena) -> list[tuple[str, str]]:
    """Pairs that are needed at one moment and share a byte, other than those that are meant to."""
    found = []
    for one, two in itertools.combinations(arena.buffers, 2):
        apart = arena.offsets[one.name] + one.size <= arena.offsets[two.name] or (
            arena.offsets[two.name] + two.size <= arena.offsets[one.name]
        )
        meant = one.over == two.name or two.over == one.name
        if one.first <= two.last and two.first <= one.last and one.size and two.size and not apart and not meant:
            found.append((one.name, two.name))
    return found
