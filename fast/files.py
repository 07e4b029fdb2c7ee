"""Writing files so that a failure leaves the old one whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

__all__ = ["atomic_save", "atomic_torch_save", "atomic_write"]


def _into_place(path: Path, write: Callable[[str], object]) -> None:
    """Write to a temporary file beside `path`, then rename it over.

    The file is on the disk before it takes the name, so that a power cut leaves the old one or
    the new one. It gets the mode that any new file of this process gets.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0o077))
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    _into_place(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def atomic_save(path: Path, arrays: dict[str, Any], header: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all.

    Args:
        path: file to write.
        arrays: all PyTorch's, or all NumPy's.
        header: the file's metadata.
    """
    if all(map(is_torch_array, arrays.values())):
        import safetensors.torch as safetensors  # here, since NumPy's arrays need no PyTorch

        whole = {name: t.contiguous() for name, t in arrays.items()}
    else:
        import safetensors.numpy as safetensors  # type: ignore[no-redef]

        whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    _into_place(path, lambda name: safetensors.save_file(whole, name, metadata=header))


def atomic_torch_save(path: Path, value: object) -> None:
    """Write a training checkpoint, whole or not at all; read it with `weights_only=True`."""
    import torch

    _into_place(path, lambda name: torch.save(value, name))
