"""Memory that stays: the C library keeps what tensors free for the next ones.

A large tensor on the CPU is new memory from the operating system, which hands it out page by page,
zeroed, each page at the price of a fault; freed, it goes back. A stream makes the same tensors chunk
after chunk, and would pay each time. What it is worth is in docs/performance.md.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["KEEP_VARIABLE", "keep_memory"]

KEEP_VARIABLE = "COMET_KEEP_MEMORY"
"""Environment variable: 0 leaves the C library as it is."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""

_TOP_PAD_BYTES = 64 * 2**20


def keep_memory() -> bool:
    """Let the process keep the memory that it frees, for its next tensors.

    The process then holds what it needed at most, which for a stream is little more than what it
    needs all the time. Results are the same. `CoMeTModel` calls this.

    Returns:
        Whether it is so: glibc is there, and the environment does not say `COMET_KEEP_MEMORY=0`.

    Source: mallopt(3). No block is mapped on its own (M_MMAP_MAX), the heap grows in large steps
    (M_TOP_PAD) and is not trimmed (M_TRIM_THRESHOLD).
    """
    if os.environ.get(KEEP_VARIABLE) == "0":
        return False
    try:
        library = ctypes.CDLL(None)
        is_glibc, mallopt = hasattr(library, "gnu_get_libc_version"), library.mallopt
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: _TOP_PAD_BYTES}
    return is_glibc and all(mallopt(name, value) for name, value in settings.items())
