"""The CUDA kernels on a CPU: the very sources, compiled by g++ under `emulation.h`.

An `Emulator` stands in for `run` of `fast/cupy_engine/kernels`, on NumPy's arrays. This package
imports neither PyTorch nor `fast`: the kernels' module is handed to it, so that a process that a
sanitizer watches stays small.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SANITIZERS", "Emulator", "build", "watch"]

FOLDER = Path(__file__).parent
CACHE = FOLDER.parent / ".emulation"
"""Compiled sources, named for what they are made of; git ignores it."""

OPTIONS = (
    *("-std=c++17", "-O1", "-g", "-fPIC", "-shared"),
    "-ffp-contract=off",  # the same rounding on every machine
    *("-fvisibility=hidden", "-fno-gnu-unique"),  # two sources loaded at once stay apart
)

SANITIZERS = {
    None: (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-fsanitize=thread",),
}
"""g++'s options for each sanitizer; None is none."""

UNIT = """#include "emulation.h"
{source}
static constexpr emulation::Entry KERNELS[] = {{{entries}}};

extern "C" __attribute__((visibility("default"))) const char* launch(
    int kernel, const unsigned* grid, unsigned threads, void** args, std::size_t shared_bytes,
    int backwards) {{
    return emulation::launch(KERNELS[kernel], grid, threads, args, shared_bytes, backwards);
}}
"""


def compiler() -> str:
    """The path of g++; an AssertionError says how to get it."""
    assert platform.machine() in ("x86_64", "AMD64"), (
        "the kernels are emulated on x86-64 alone, where their fibers can be switched: run these "
        f"tests on such a machine, not on {platform.machine()}"
    )
    found = shutil.which("g++")
    assert found, "the kernels are compiled by g++, which is missing: run apt-get install g++"
    return found


def build(source: str, names: Sequence[str], sanitizer: str | None = None) -> Path:
    """Compile a source for the CPU, once.

    Args:
        source: CUDA C++.
        names: the kernels that can be launched, as name expressions.
        sanitizer: a key of `SANITIZERS`.

    Returns:
        The shared library.
    """
    gxx = compiler()
    entries = ", ".join(f"emulation::Bound<&{name}>::call" for name in names)
    unit = UNIT.format(source=source, entries=entries)
    options = (*OPTIONS, *SANITIZERS[sanitizer])
    made_of = [unit, *options, *(p.read_text() for p in sorted(FOLDER.glob("*.h")))]
    digest = hashlib.sha256("\0".join(made_of).encode()).hexdigest()[:24]
    library = CACHE / f"{digest}.so"
    if library.exists():
        return library
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # others may build the same
        made = Path(folder, "kernels.so")
        command = [gxx, *options, f"-I{FOLDER}", "-x", "c++", "-", "-o", str(made)]
        result = subprocess.run(command, input=unit, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"g++ refuses the kernels:\n{result.stderr}"
        os.replace(made, library)
    return library


class Emulator:
    """Launches kernels on the CPU, as `kernels.run` does on a GPU."""

    def __init__(
        self,
        kernels: Any,
        library: Path,
        names: Sequence[str],
        backwards: bool = False,
    ) -> None:
        """A compiled library of kernels.

        Args:
            kernels: the module `fast.cupy_engine.kernels`, for its `check` and `parameters`.
            library: what `build` returned for the same names.
            backwards: whether lanes, warps and blocks run from the last to the first.
        """
        self.kernels, self.names, self.backwards = kernels, list(names), backwards
        self._launch = ctypes.CDLL(str(library)).launch
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
        ]

    def __call__(
        self,
        name: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: tuple,
        shared_mem: int = 0,
    ) -> None:
        """Launch; see `kernels.run`. Arrays that are written to start as NaN."""
        self.kernels.check(name, args)
        kernel = name.partition("<")[0]
        held = []
        for parameter, value in zip(self.kernels.parameters()[kernel], args, strict=True):
            if parameter.is_output:
                value.reshape(-1).view(np.uint8)[:] = 0xFF
            held.append(np.array(value.ctypes.data if parameter.is_pointer else value))
        places = (ctypes.c_void_p * len(held))(*(x.ctypes.data for x in held))
        blocks = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        assert len(block) == 1, f"{name}: blocks of {block} threads; one dimension is emulated"
        wrong = self._launch(
            self.names.index(name), blocks, block[0], places, shared_mem, self.backwards
        )
        assert wrong is None, f"{name}: {wrong.decode()}"


def watch(library: Path, names: Sequence[str], sanitizer: str) -> subprocess.CompletedProcess[str]:
    """Run the fixed shapes of `__main__` in a process that a sanitizer watches.

    Args:
        library: built with that sanitizer, for these names.
        names: as in `build`.

    Returns:
        The process: its exit status is 0 where the sanitizer found nothing, and else its standard
        error tells what.
    """
    runtime = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    found = subprocess.run(
        [compiler(), f"-print-file-name={runtime}"], capture_output=True, text=True, check=True
    )
    return subprocess.run(
        [sys.executable, "-m", "parity.emulation", str(library), *names],
        cwd=FOLDER.parent.parent,
        env=os.environ
        | {
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "OPENBLAS_NUM_THREADS": "1",  # its threads would be watched too
        },
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=keep_addresses,
    )


def keep_addresses() -> None:
    """Ask Linux not to place this process's memory at random: the thread sanitizer of some
    compilers does not start where addresses vary by much."""
    ctypes.CDLL(None).personality(0x0040000)  # ADDR_NO_RANDOMIZE
