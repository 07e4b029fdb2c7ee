"""NVIDIA's run-time compiler without a driver: kernels compiled for GPUs that are not there, and
what each of them needs.

The library and CUDA's headers come with the packages `nvidia-cuda-nvrtc` and
`nvidia-cuda-runtime`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

OPTIONS = ("-std=c++17", "-ftz=true", "--ptxas-options=-v")
"""What CuPy passes, and the report of what a kernel needs."""


class Usage(NamedTuple):
    """What a compiled kernel needs."""

    registers: int
    """32-bit registers a thread."""

    shared: int
    """Bytes of static shared memory a block."""

    stack: int
    """Bytes of stack a thread."""

    spilled: int
    """Bytes that a thread stores and loads for want of registers."""


def _find(pattern: str) -> Path:
    """A file of the packages; an AssertionError says how to get them."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = [path for folder in folders or () for path in Path(folder).rglob(pattern)]
    assert found, (
        f"{pattern} is missing: on Linux and x86-64 run pip install nvidia-cuda-nvrtc "
        "nvidia-cuda-runtime"
    )
    return found[0]


def compile_kernels(source: str, names: Sequence[str], arch: str) -> dict[str, Usage]:
    """Compile kernels to machine code.

    Args:
        source: CUDA C++.
        names: name expressions of the kernels.
        arch: such as "sm_90".

    Returns:
        What each needs, by name.
    """
    ctypes.CDLL(str(_find("libnvrtc-builtins.so.13.*")), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(_find("libnvrtc.so.13")))
    program = ctypes.c_void_p()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
    )
    assert created == 0, f"NVRTC error {created}"
    try:
        for name in names:
            assert nvrtc.nvrtcAddNameExpression(program, name.encode()) == 0, name
        headers = f"-I{_find('cu13/include/cuda_fp16.h').parent}"
        options = [option.encode() for option in (*OPTIONS, f"-arch={arch}", headers)]
        failed = nvrtc.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*options)
        )
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        assert not failed, f"NVRTC refuses the kernels for {arch}:\n{log.value.decode()}"
        usages = _read(log.value.decode())
        found = {}
        for name in names:
            lowered = ctypes.c_char_p()
            nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered))
            found[name] = usages[lowered.value.decode()]
        return found
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(log: str) -> dict[str, Usage]:
    """The report on each kernel, by its lowered name."""
    usages = {}
    for part in log.split("Compiling entry function '")[1:]:

        def number(words: str, part: str = part) -> int:
            match = re.search(rf"(\d+) {words}", part)
            return int(match[1]) if match else 0

        spilled = number("bytes spill stores") + number("bytes spill loads")
        usage = Usage(number("registers"), number("bytes smem"), number("bytes stack"), spilled)
        usages[part.partition("'")[0]] = usage
    return usages
