"""states"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .files import atomic_save

Layers = tuple[Tensor, ...]


def write_state(
    path: Path, model: str, counts: dict[str, np.ndarray], tensors: dict[str, Layers]
) -> None:
    """Write a stream's state to one safetensors file, whole or not at all.

    Args:
        path: file to write.
        model: fingerprint of the config that it belongs to.
        counts: [b] int64 each, stored as `count.NAME`.
        tensors: one a layer each, stored as `NAME.LAYER`.
    """
    named = {f"count.{name}": torch.from_numpy(count) for name, count in counts.items()}
    named |= {f"{name}.{i}": t for name, layers in tensors.items() for i, t in enumerate(layers)}
    header = {"format": "comet-state", "version": "1", "model": model}
    # Copies: safetensors refuses tensors that share memory, as a new state's counts do.
    atomic_save(path, {name: t.detach().clone() for name, t in named.items()}, header)


def read_state(
    path: Path, counts: Collection[str], tensors: Collection[str]
) -> tuple[str, dict[str, np.ndarray], dict[str, Layers]]:
    """Read what `write_state` wrote: whole, finite, and nothing else; whether it fits a model is
    not asked.

    Args:
        path: file to read.
        counts, tensors: the names that a state has.

    Returns:
        The fingerprint, the counts, the tensors; of a name that is not there no layers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state, or cut short.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); it may be cut short. "
            "Save the state again."
        ) from error
    if header.get("format") != "comet-state" or header.get("version") != "1":
        raise ValueError(
            f"{path} is not a CoMeT state (header {json.dumps(header)}); expected a file "
            "written by CoMeTState.save."
        )
    numbers = {}
    for name in counts:
        count = found.pop(f"count.{name}", None)
        if count is None or count.dtype != torch.int64 or count.dim() != 1 or not len(count):
            raise ValueError(
                f"{path} lacks count.{name} as int64 of one dimension; it is not a whole state."
            )
        numbers[name] = count.numpy()
    grouped: dict[str, Layers] = {}
    for name in tensors:
        layers = range(sum(key.rpartition(".")[0] == name for key in found))
        if any(f"{name}.{i}" not in found for i in layers):
            raise ValueError(f"{path} lacks layers of {name}; it is not a whole state.")
        grouped[name] = tuple(found.pop(f"{name}.{i}") for i in layers)
    if found:
        raise ValueError(f"{path} holds {sorted(found)}, which no state has.")
    if not all(t.isfinite().all() for layers in grouped.values() for t in layers):
        raise ValueError(f"{path} holds NaN or infinity; the stream was lost before it was saved.")
    return header.get("model", ""), numbers, grouped
