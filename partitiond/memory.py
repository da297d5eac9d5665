"""Keeping a long-lived process of many threads small."""

from __future__ import annotations

import ctypes
import gc

# parameters of mallopt(3), from malloc.h of glibc
_M_TRIM_THRESHOLD, _M_ARENA_MAX = -1, -8


def be_frugal() -> None:
    """Let all threads allocate from one arena; to be called before they start.

    The C library gives each thread one of its own, up to eight for each processor, and each keeps what its busiest moment
    took (glibc; elsewhere there is nothing to do). The interpreter's lock lets one thread at a time allocate anyway.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 128 << 10)  # as it is at first; else it grows with what was freed


def settle() -> None:
    """Give back what the start has taken, and let the collector pass over what is here to stay."""
    gc.collect()
    gc.freeze()
    trim()


def trim() -> None:
    """Give back what is free: 10 MB of 70 after a few passes over 300 partitions, in less than 1 ms."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
