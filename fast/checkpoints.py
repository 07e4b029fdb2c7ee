"""Weights and states as files: safetensors and JSON, in and out.

Nothing is ever unpickled and no code is run. Every file is written whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from reference.config import CoMeTConfig
from reference.parameters import map_parameters, named_parameters, shapes

from .files import atomic_save, atomic_write
from .layers import Weights, widen
from .parameters import check_weights, to_arrays

__all__ = [
    "CONFIG",
    "MODEL",
    "load_arrays",
    "load_checkpoint",
    "named_tensors",
    "read_json",
    "read_state",
    "read_tensors",
    "save_checkpoint",
    "take_tensor",
    "write_state",
]

CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
"""Files of a checkpoint's folder. The index is there where the weights are cut into shards."""


def save_checkpoint(folder: Path, config: CoMeTConfig, weights: Weights) -> None:
    """Write config.json and model.safetensors under our names.

    Args:
        folder: made where it does not exist; files in it are replaced.
        weights: nested dict or `ParameterTree` of tensors.
    """
    atomic_save(folder / MODEL, named_tensors(config, weights), {"format": "pt"})
    atomic_write(folder / CONFIG, config.to_json())


def load_checkpoint(folder: Path) -> tuple[CoMeTConfig, dict[str, Any]]:
    """Read a checkpoint, ours or an official one.

    Returns:
        The config, and a nested dict of tensors on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short, foreign, or does not fit the config.
    """
    data = read_json(folder / CONFIG)
    if "temp_beacon_id" in data:
        # Imported here and not above: that package is made with the readers of this module.
        from .pretrained import load_published

        config, weights, _ = load_published(folder)
        return config, weights
    if "backbone" not in data:
        raise ValueError(
            f"{folder / CONFIG} is neither a CoMeT config (keys 'backbone' and 'memory') nor an "
            f"official CoMeT checkpoint's (key 'temp_beacon_id'); it has {sorted(data)[:8]}."
        )
    config = CoMeTConfig.from_dict(data)
    tensors = read_tensors(folder)
    unknown = sorted(set(tensors) - set(named_parameters(shapes(config))))
    if unknown:
        raise ValueError(
            f"{folder / MODEL} holds {unknown[:4]}, which the config has no place for."
        )
    weights = map_parameters(
        lambda name, _: take_tensor(tensors, name, name, folder), shapes(config)
    )
    check_weights(weights, config)
    return config, weights


def load_arrays(folder: Path) -> tuple[CoMeTConfig, dict[str, Any]]:
    """`load_checkpoint` as NumPy arrays, for the reference; narrower dtypes become float32."""
    config, weights = load_checkpoint(folder)
    return config, to_arrays(map_parameters(lambda _, tensor: widen(tensor), weights))


def named_tensors(config: CoMeTConfig, weights: Weights) -> dict[str, Tensor]:
    """Every weight of a model by its dotted name, without its graph: what a file holds.

    Args:
        weights: nested dict or `ParameterTree` of tensors.
    """
    tensors = {}
    for name in named_parameters(shapes(config)):
        found: Any = weights
        for part in name.split("."):
            found = found[int(part) if part.isdigit() else part]
        tensors[name] = found.detach()
    return tensors


def take_tensor(tensors: dict[str, Tensor], stored: str, name: str, folder: Path) -> Tensor:
    """One tensor of a checkpoint.

    Args:
        tensors: of `read_tensors`.
        stored: its name in the files.
        name: our name of it.
        folder: of the checkpoint, for the message.

    Raises:
        ValueError: it is not there.
    """
    if stored not in tensors:
        raise ValueError(f"{folder} lacks the tensor {stored} ({name}); is the checkpoint whole?")
    return tensors[stored]


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); it may be cut short.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected a JSON object.")
    return data


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of model.safetensors, or of the shards that its index names, on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not readable, or the index names one outside the folder.
    """
    files: list[Any] = [MODEL]
    if not (folder / MODEL).exists() and (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        files = list(places.values()) if isinstance(places, dict) else [places]
        outside = [name for name in files if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise ValueError(f"{folder / INDEX} names {outside}; expected files of that folder.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files)):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; expected a checkpoint's weights.")
        try:
            tensors |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(
                f"{folder / name} is not a readable safetensors file ({error}); it may be cut short."
            ) from error
    return tensors


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
