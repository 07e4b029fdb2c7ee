"""Writing files so that a failure leaves the old one whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["atomic_save", "atomic_torch_save", "atomic_write"]


def _into_place(path: Path, write: Callable[[str], object]) -> None:
    """Write to a temporary file beside `path`, then rename it over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def atomic_write(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    _into_place(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def atomic_save(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    whole = {name: t.contiguous() for name, t in tensors.items()}
    _into_place(path, lambda name: save_file(whole, name, metadata=header))


def atomic_torch_save(path: Path, value: object) -> None:
    """Write a training checkpoint, whole or not at all; read it with `weights_only=True`."""
    _into_place(path, lambda name: torch.save(value, name))
