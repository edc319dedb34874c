"""The C library's heap, for who times functions that allocate."""

from __future__ import annotations

import ctypes


def keep_freed_memory() -> str:
    """Let the process keep what it frees, as the allocators do that torch's tuning guide advises; says what is used.

    Otherwise glibc gives large blocks back at once, and every step pays for their pages anew: method and baseline
    alike, but the faults would drown what is measured. Nothing changes on other systems.
    """
    trim_threshold, mmap_threshold, huge = -1, -3, 2**30
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return "the system's"
    return "glibc, freed memory kept" if mallopt(mmap_threshold, huge) and mallopt(trim_threshold, huge) else "glibc"
