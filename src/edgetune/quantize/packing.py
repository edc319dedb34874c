"""Buffers with lifetimes -> places in one block of memory, as a program without an allocator has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

ALIGNED = 4
"""Bytes: where a float or an int32 may begin."""


@dataclass(frozen=True)
class Buffer:
    """`size` bytes that hold something from moment `first` to moment `last`, both included.

    With `over` it lies at the very place of that other buffer, which ends at the moment at which this one begins.
    """

    name: str
    kind: str
    size: int
    first: int
    last: int
    over: str | None = None

    def meets(self, other: Buffer) -> bool:
        """Whether there is a moment at which both are needed."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Buffers and the offset of each."""

    buffers: tuple[Buffer, ...]
    offsets: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes of the whole block."""
        return max((self.offsets[each.name] + each.size for each in self.buffers), default=0)

    @property
    def fullest(self) -> tuple[int, int]:
        """The moment at which most bytes are needed, and how many: no placing takes less."""
        moments = sorted({each.first for each in self.buffers}) or [0]
        worst = max(moments, key=lambda moment: live_bytes(self.buffers, moment))
        return worst, live_bytes(self.buffers, worst)


def live_bytes(buffers: Iterable[Buffer], moment: int) -> int:
    """Bytes needed at a moment; of buffers that lie over one another the larger counts."""
    alive = {each.name: each for each in buffers if each.first <= moment <= each.last}
    under = {each.over: each.size for each in alive.values() if each.over in alive}
    return sum(max(each.size, under.get(name or "", 0)) for name, each in alive.items() if each.over not in alive)


def pack(buffers: Sequence[Buffer]) -> Arena:
    """Place every buffer at the lowest offset that is free in its lifetime (first fit).

    What lies over one another is placed as one. Several orders are tried, large, long-lived or early first, and the
    smallest block is taken.
    """
    groups = _groups(buffers)
    orders: tuple[Callable[[list[Buffer]], tuple[int, ...]], ...] = (
        lambda group: (-max(each.size for each in group), group[0].first),
        lambda group: (-_duration(group), -max(each.size for each in group)),
        lambda group: (group[0].first, -max(each.size for each in group)),
        lambda group: (-_duration(group) * max(each.size for each in group),),
    )
    return min((Arena(tuple(buffers), _placed(sorted(groups, key=order))) for order in orders),
               key=lambda arena: arena.size)


def _groups(buffers: Sequence[Buffer]) -> list[list[Buffer]]:
    """Chains of buffers that lie over one another, in the order of time."""
    group_of: dict[str, list[Buffer]] = {}
    groups = []
    for each in sorted(buffers, key=lambda each: each.first):
        if each.over is None:
            groups.append([each])
            group_of[each.name] = groups[-1]
        else:
            group_of[each.name] = group_of[each.over]
            group_of[each.over].append(each)
    return groups


def _duration(group: list[Buffer]) -> int:
    return max(each.last for each in group) - group[0].first


def _placed(groups: list[list[Buffer]]) -> dict[str, int]:
    offsets: dict[str, int] = {}
    placed: list[Buffer] = []
    for group in groups:
        taken = sorted((offsets[other.name] - each.size + 1, offsets[other.name] + other.size)
                       for each in group for other in placed if each.meets(other) and each.size and other.size)
        offset = 0
        for low, high in taken:  # offsets at which some member would reach into what is placed
            if low <= offset < high:
                offset = -(-high // ALIGNED) * ALIGNED
        # a longer interval that began lower may still hold the new offset
        while any(low <= offset < high for low, high in taken):
            offset = -(-max(high for low, high in taken if low <= offset < high) // ALIGNED) * ALIGNED
        offsets |= {each.name: offset for each in group}
        placed += group
    return offsets
