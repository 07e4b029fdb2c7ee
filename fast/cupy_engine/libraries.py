"""The array library that an engine computes with, or what to do where it is not ready."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from ..inputs import check_choice, check_kind

__all__ = ["check_cupy", "import_library"]


def import_library(library: str | Any) -> Any:
    """The array library of a name, ready to compute; a module of the standard is its own.

    Raises:
        ImportError: it is not installed, or finds no GPU.
        ValueError: the name is not known.
    """
    check_kind("library", library, (str, ModuleType), "'cupy', 'numpy' or a module of the standard")
    name = library if isinstance(library, str) else library.__name__
    if name not in ("cupy", "numpy") and not isinstance(library, str):
        return library
    check_choice("library", name, ("cupy", "numpy"))
    if name == "cupy":
        check_cupy()
    return importlib.import_module(f"array_api_compat.{name}")


def check_cupy() -> None:
    """Raise an ImportError that says what to do unless CuPy computes on a GPU."""
    try:
        cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"CuPy is not installed ({error}); install the one for your CUDA, pip install "
            '"comet-memory[cupy]" for CUDA 12 or "comet-memory[cupy13]" for CUDA 13, or take '
            'library="numpy".'
        ) from error
    except ImportError as error:
        raise ImportError(
            f"CuPy is installed but does not load ({error}); check the driver with nvidia-smi, "
            'reinstall the CuPy for its CUDA, or take library="numpy".'
        ) from error
    runtime = cupy.cuda.runtime
    built, driver = runtime.runtimeGetVersion(), runtime.driverGetVersion()  # 12090 is CUDA 12.9
    if not driver:
        raise ImportError(
            f"CuPy {cupy.__version__} finds no NVIDIA driver (libcuda.so.1); install one and check "
            'it with nvidia-smi, or take library="numpy".'
        )
    if driver // 1000 < built // 1000:
        raise ImportError(
            f"CuPy {cupy.__version__} is built for CUDA {built // 1000}, the driver knows CUDA "
            f"{driver // 1000}.{driver % 1000 // 10} at most; install the CuPy for that, for "
            'example "comet-memory[cupy]" for CUDA 12, or update the driver.'
        )
    try:
        runtime.getDeviceCount()
    except RuntimeError as error:
        raise ImportError(
            f"CuPy {cupy.__version__} finds no GPU ({error}); check nvidia-smi and "
            'CUDA_VISIBLE_DEVICES, or take library="numpy".'
        ) from error
    try:
        (cupy.ones(1) + 1).get()  # which compiles, so that a missing compiler shows here
    except Exception as error:  # many kinds: a library, a header or the compiler may be missing
        raise ImportError(
            f"CuPy {cupy.__version__} finds a GPU but cannot compute on it ({error}); it needs the "
            f'libraries of CUDA {built // 1000}, e.g. pip install "cupy-cuda{built // 1000}x[ctk]".'
        ) from error
