"""Writing files so that a failure leaves the old one whole."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import is_torch_array

from .arrays import dtype_name, to_host

__all__ = [
    "atomic_save",
    "atomic_write",
    "check_regular",
    "digest",
]

HEADER = "comet"
"""The one key of our files' metadata, a JSON object: several would be written in any order."""


def check_regular(path: Path) -> None:
    """Raise unless a path is a file that can be read to its end, or none at all.

    Raises:
        ValueError: it is a folder, a pipe, a device or the like.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is not a regular file; give one.")


def digest(arrays: dict[str, Any]) -> str:
    """SHA-256 of arrays: of their names, dtypes, shapes and numbers, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        x = to_host(arrays[name])
        found.update(f"{name} {dtype_name(x)} {x.shape}\n".encode())
        found.update(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


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


def atomic_save(path: Path, arrays: dict[str, Any], header: dict[str, Any]) -> None:
    """Write a safetensors file, whole or not at all, with the digest of its arrays.

    Args:
        path: file to write.
        arrays: all PyTorch's, or all NumPy's.
        header: what else is told of them, fit for JSON. A "format" stands as metadata of its own,
            where other programs look for it.
    """
    own = {name: value for name, value in header.items() if name != "format"}
    metadata = {name: header[name] for name in ("format",) if name in header}
    metadata[HEADER] = json.dumps(own | {"digest": digest(arrays)}, sort_keys=True)
    if all(map(is_torch_array, arrays.values())):
        import safetensors.torch as safetensors  # here, since NumPy's arrays need no PyTorch

        whole = {name: t.contiguous() for name, t in arrays.items()}
    else:
        import safetensors.numpy as safetensors  # type: ignore[no-redef]

        whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
    _into_place(path, lambda name: safetensors.save_file(whole, name, metadata=metadata))
