"""Placing buffers: nothing that lives at the same time overlaps, and little is wasted."""

from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from edgetune.quantize import packing
from edgetune.quantize.packing import ALIGNED, Arena, Buffer, live_bytes, pack
from packed import overlapping

ROOM = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6), st.integers(0, 6)), max_size=12)


def buffers(sizes_and_moments: list[tuple[int, int, int]]) -> list[Buffer]:
    return [Buffer(str(i), "map", size, min(a, b), max(a, b)) for i, (size, a, b) in enumerate(sizes_and_moments)]


@given(ROOM)
def test_nothing_alive_overlaps(room: list[tuple[int, int, int]]) -> None:
    arena = pack(buffers(room))
    assert overlapping(arena) == []
    assert all(offset % ALIGNED == 0 for offset in arena.offsets.values())
    moment, needed = arena.fullest
    assert needed == max((live_bytes(arena.buffers, t) for t in range(7)), default=0)
    assert live_bytes(arena.buffers, moment) == needed
    assert needed <= arena.size <= sum(-(-each.size // ALIGNED) * ALIGNED for each in arena.buffers)


@given(ROOM, st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=2, max_size=4))
def test_what_lies_over_one_another_has_one_place(
    room: list[tuple[int, int, int]], chain: list[tuple[int, int]]
) -> None:
    links, start = [], 0
    for i, (size, length) in enumerate(chain):
        links.append(Buffer(f"link {i}", "map", size, start, start + length, f"link {i - 1}" if i else None))
        start += length
    arena = pack([*buffers(room), *links])
    assert len({arena.offsets[each.name] for each in links}) == 1
    assert overlapping(arena) == []
    assert arena.size >= arena.fullest[1]


def test_bytes_alive_count_the_larger_of_two_that_lie_over_one_another() -> None:
    pair = [Buffer("a", "map", 8, 0, 1), Buffer("b", "map", 12, 1, 2, over="a"), Buffer("c", "map", 1, 1, 1)]
    assert [live_bytes(pair, t) for t in range(4)] == [8, 13, 12, 0]


def test_is_mostly_as_good_as_the_best_order_of_all() -> None:
    chance, best, taken = random.Random(0), 0, 0
    for _ in range(60):
        room = buffers([(4 * chance.randint(1, 9), chance.randint(0, 5), chance.randint(0, 5)) for _ in range(5)])
        optimum = min(
            Arena(tuple(room), packing._placed([[each] for each in order])).size
            for order in itertools.permutations(room)
        )
        got = pack(room).size
        assert got >= optimum
        best += got == optimum
        taken += 1
    assert best >= 0.9 * taken
