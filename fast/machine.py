"""What a measurement ran on, and how much memory it took."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import torch

__all__ = ["machine", "peak_memory"]


def machine(how: str) -> str:
    """Processor, how it was used, and versions: what stands under a table of figures.

    Args:
        how: processes and threads, in words.
    """
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name}, {how}, Python {platform.python_version()}, torch {torch.__version__}"


def peak_memory() -> int:
    """Largest resident set that this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: ru_maxrss would start at the parent's
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
