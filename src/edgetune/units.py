"""Bytes, counts and times, written and read in one place. No torch here.

Memory is always binary (1 KiB = 1024 bytes), because allocators and microcontrollers count that way.
"""

from __future__ import annotations

import re

from edgetune.errors import BudgetError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_BYTE_UNITS = {"": 1, "b": 1, "k": KIB, "kb": KIB, "kib": KIB, "m": MIB, "mb": MIB, "mib": MIB,
               "g": GIB, "gb": GIB, "gib": GIB}


def parse_bytes(text: str) -> int:
    """Read an amount of memory such as `24MiB`, `256 KiB`, `1.5g` or `4096` into bytes.

    Raises BudgetError when the text is not an amount, or not a positive one.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _BYTE_UNITS:
        raise BudgetError(f"'{text}' is not an amount of memory: write a number and a unit, such as 24MiB or 256KiB")
    amount = int(float(match[1]) * _BYTE_UNITS[match[2].lower()])
    if amount <= 0:
        raise BudgetError(f"'{text}' leaves no memory at all: give a positive amount, such as 24MiB")
    return amount


def format_bytes(n_bytes: float) -> str:
    """Write bytes for a person: `512 B`, `3.4 KiB`, `24.0 MiB`."""
    for size, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def format_count(count: float) -> str:
    """Write a count of operations or parameters for a person: `950`, `3.5 M`, `1.8 G`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"


def format_ms(ms: float) -> str:
    """Write a time for a person: `0.42 ms`, `18.3 ms`, `2.1 s`."""
    if ms >= 1000:
        return f"{ms / 1000:.1f} s"
    return f"{ms:.2f} ms" if ms < 10 else f"{ms:.1f} ms"
