"""The machine: what a measurement ran on, how much memory it took, and how memory is kept."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

__all__ = ["keep_memory", "machine", "peak_memory", "resident_memory", "threads"]


def machine(how: str) -> str:
    """Processor, how it was used, and versions: what stands under a table of figures.

    Args:
        how: processes and threads, in words.
    """
    told = _processor()
    name = told.get("model name") or platform.processor() or platform.machine()
    flags = told.get("flags", "").split()
    units = [unit for flag, unit in UNITS.items() if flag in flags]
    name += f" with {' and '.join(units)}" if units else " without AMX" if flags else ""
    return f"{name}, {how}, Python {platform.python_version()}, torch {version('torch')}"


UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512_fp16": "AVX512-FP16"}
"""What of a processor makes products of half types fast, by its flag."""


def _processor() -> dict[str, str]:
    """What Linux tells of the first processor, by name; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return {}
    first = info.read_text().partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def threads() -> str:
    """How many threads PyTorch computes with, in words."""
    import torch  # here, since the engine needs none

    number = torch.get_num_threads()
    return f"{number} thread{'s' * (number > 1)}"


def peak_memory() -> int:
    """Largest resident set that this process has had, in bytes."""
    told = _status("VmHWM")
    if told is not None:  # Linux: ru_maxrss would start at the parent's
        return told
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """The resident set of this process now, in bytes; the largest so far where it is not told."""
    told = _status("VmRSS")
    return peak_memory() if told is None else told


def _status(name: str) -> int | None:
    """A size that Linux tells of this process, in bytes; None elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(x for x in status.read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's mallopt(3)."""

_TOP_PAD_BYTES = 64 * 2**20


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, for its next tensors.

    A large tensor on the CPU is new memory from the operating system, which hands it out page by
    page, zeroed, each page at the price of a fault. Once freed, it goes back. A stream makes the
    same tensors chunk after chunk, and would pay each time. What this is worth is in
    docs/performance.md.

    The setting holds for the whole process, other libraries included, so it is left to the program:
    call it once, at the start. The process then holds what it needed at most, which for a stream
    is little more than what it needs all the time. Results are the same.

    Returns:
        Whether it is so: on another system or with another C library nothing is changed.

    Source: mallopt(3). No block is mapped on its own (M_MMAP_MAX), the heap grows in large steps
    (M_TOP_PAD) and is not trimmed (M_TRIM_THRESHOLD).
    """
    try:
        library = ctypes.CDLL(None)
        is_glibc, mallopt = hasattr(library, "gnu_get_libc_version"), library.mallopt
    except (OSError, TypeError, AttributeError):  # another system, or another C library
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: _TOP_PAD_BYTES}
    return is_glibc and all(mallopt(name, value) for name, value in settings.items())
