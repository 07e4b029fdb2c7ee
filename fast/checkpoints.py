"""Weights and states as files: safetensors and JSON, in and out.

Nothing is ever unpickled and no code is run. Every file is written whole or not at all, with a
digest of its arrays that is held against them when it is read. Arrays are read as PyTorch's ("pt")
or as NumPy's ("np"), bfloat16 among them through ml_dtypes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import is_array_api_obj, is_torch_array
from safetensors import SafetensorError, safe_open

from reference.config import LATER, CoMeTConfig
from reference.parameters import map_parameters, named_parameters, shapes

from .arrays import Array, all_finite, dtype_name, is_floating, shown, to_host
from .files import HEADER, atomic_save, atomic_write, check_regular, digest, told

__all__ = [
    "CONFIG",
    "MODEL",
    "check_layers",
    "check_weights",
    "load_arrays",
    "load_checkpoint",
    "named_tensors",
    "of_file",
    "read_file",
    "read_header",
    "read_json",
    "read_state",
    "read_tensors",
    "read_training",
    "refuse_broken",
    "save_checkpoint",
    "take_tensor",
    "weights_digest",
    "write_state",
    "write_training",
]

CONFIG, MODEL, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
"""Files of a checkpoint's folder. The index is there where the weights are cut into shards."""


def save_checkpoint(folder: Path, config: CoMeTConfig, weights: Any) -> None:
    """Write config.json and model.safetensors under our names.

    The weights' file holds the config too, so that one model's weights are never read with
    another's config.

    Args:
        folder: made where it does not exist; files in it are replaced.
        weights: nested dict or `ParameterTree` of tensors.

    Raises:
        ValueError: a weight holds NaN or infinity; nothing is written.
    """
    tensors = named_tensors(config, weights)
    refuse_broken(tensors)
    atomic_save(folder / MODEL, tensors, {"config": config.to_dict()})
    atomic_write(folder / CONFIG, config.to_json())


def refuse_broken(tensors: dict[str, Array]) -> None:
    """Raise ValueError unless weights that are to be written are finite numbers."""
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ValueError(
                f"{name} holds NaN or infinity, so nothing was written; go back to a checkpoint "
                "from before the training diverged."
            )


def load_checkpoint(folder: Path, framework: str = "pt") -> tuple[CoMeTConfig, dict[str, Any]]:
    """Read a checkpoint, ours or an official one.

    Args:
        folder: of the checkpoint.
        framework: whose arrays, "pt" or "np".

    Returns:
        The config, and a nested dict of arrays on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short, foreign, or does not fit the config.
    """
    has_config = (folder / CONFIG).exists() or not (folder / MODEL).exists()
    data = read_json(folder / CONFIG) if has_config else read_header(folder / MODEL).get("config")
    if not isinstance(data, dict):
        raise FileNotFoundError(f"{folder / CONFIG} is missing; expected a checkpoint's config.")
    if "temp_beacon_id" in data:
        # Imported here and not above: that package is made with the readers of this module.
        from .pretrained import load_published

        config, weights, _ = load_published(folder, framework)
        return config, weights
    if "backbone" not in data:
        raise ValueError(
            f"{folder / CONFIG} is neither a CoMeT config (keys 'backbone' and 'memory') nor an "
            f"official CoMeT checkpoint's (key 'temp_beacon_id'); it has {sorted(data)[:8]}."
        )
    with of_file(folder / CONFIG):
        config = CoMeTConfig.from_dict(data)
    tensors = read_tensors(folder, framework)
    check_layers(config, tensors, folder)
    if (folder / MODEL).exists():
        told = read_header(folder / MODEL).get("config")
        _check_whole(data, config, folder) if told is None else _check_same(told, config, folder)
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


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Let a ValueError of the block name the file that its numbers are from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path} is no config of a model: {error}") from error


def check_layers(config: CoMeTConfig, tensors: Collection[str], folder: Path) -> None:
    """Raise ValueError where a config has more layers than there are tensors, before any list of
    that length is made.
    """
    layers = config.backbone.num_hidden_layers
    if layers > len(tensors):
        raise ValueError(
            f"{folder / CONFIG} says {layers} layers, but there are {len(tensors)} tensors; the "
            "config is damaged or of another model."
        )


def _check_whole(data: dict[str, Any], config: CoMeTConfig, folder: Path) -> None:
    """Raise ValueError where config.json leaves a field to its default, and the weights' file does
    not tell what it was.
    """
    lacking = [
        f"{part}.{name}"
        for part, fields in config.to_dict().items()
        for name in fields
        if name not in data[part] and name not in LATER
    ]
    if lacking:
        raise ValueError(
            f"{folder / CONFIG} lacks {', '.join(lacking)}; give every field, as save_pretrained "
            "does: a default may not be what the weights were trained with."
        )


def _check_same(data: Any, config: CoMeTConfig, folder: Path) -> None:
    """Raise ValueError unless the config in the weights' file is that of config.json."""
    saved, parts = CoMeTConfig.from_dict(data).to_dict(), config.to_dict()
    differing = [
        f"{part}.{name}"
        for part, fields in parts.items()
        for name, value in fields.items()
        if saved[part][name] != value
    ]
    if not differing:
        return
    raise ValueError(
        f"{folder / CONFIG} differs from the config that {MODEL} was saved with in "
        f"{', '.join(differing)}; a save was cut between the two, or the file was edited. Without "
        f"{CONFIG} the weights' own config is taken; to change it, load and give it to CoMeTModel."
    )


def load_arrays(folder: Path) -> tuple[CoMeTConfig, dict[str, Any]]:
    """`load_checkpoint` as NumPy arrays, for the reference; narrower dtypes become float32."""
    config, weights = load_checkpoint(folder, "np")

    def widen(_: str, x: Array) -> Array:
        return x.astype(np.float32) if x.itemsize < 4 else x

    return config, map_parameters(widen, weights)


def named_tensors(config: CoMeTConfig, weights: Any) -> dict[str, Array]:
    """Every weight of a model by its dotted name, without its graph: what a file holds.

    Args:
        weights: nested dict or `ParameterTree` of tensors.
    """
    return {
        name: x.detach() if is_torch_array(x) else to_host(x)
        for name, x in _leaves(config, weights).items()
    }


def _leaves(config: CoMeTConfig, weights: Any) -> dict[str, Array]:
    """Every weight of a model by its dotted name, where it is."""
    leaves = named_parameters(weights.to_dict() if hasattr(weights, "to_dict") else weights)
    return {name: leaves[name] for name in named_parameters(shapes(config))}


def weights_digest(config: CoMeTConfig, weights: Any) -> str:
    """SHA-256 of a model's weights: the same for the same numbers in the same dtype, whichever
    library holds them. It takes about a second a gigabyte, and the host's memory for one weight.

    Args:
        weights: nested dict or `ParameterTree` of arrays.
    """
    return digest(_leaves(config, weights))


def take_tensor(tensors: dict[str, Array], stored: str, name: str, folder: Path) -> Array:
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


def check_weights(weights: dict[str, Any], config: CoMeTConfig) -> None:
    """Raise unless weights are whole, fit a config, and are finite numbers of one dtype.

    Args:
        weights: nested dict of arrays.
        config: the model.

    Raises:
        ValueError: names the first weight that is wrong, what it is and what it should be.
    """
    expected, found = named_parameters(shapes(config)), named_parameters(weights)
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"the weights lack {missing[:4]} and hold unknown {unknown[:4]}; give exactly the "
            "names of reference.parameters.shapes(config)."
        )
    for name, x in found.items():
        if not is_array_api_obj(x):
            raise ValueError(f"{name} is a {type(x).__name__}; expected an array or a tensor.")
    dtype = found["norm"].dtype
    for name, shape in expected.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the config says {shape}; the weights are "
                "of another model, or the config was changed."
            )
        if tensor.dtype != dtype or not is_floating(tensor):
            raise ValueError(
                f"{name} is {tensor.dtype} where norm is {dtype}; convert all to one float dtype."
            )
        if not all_finite(tensor):
            raise ValueError(
                f"{name} holds NaN or infinity; the file is damaged or its training diverged."
            )


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not an object.
    """
    check_regular(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a ValueError
        raise ValueError(f"{path} is not JSON ({error}); it may be cut short.") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected a JSON object.")
    return data


def read_header(path: Path) -> dict[str, Any]:
    """What `atomic_save` told of a file's arrays, and its other metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not readable.
    """
    metadata, own, _ = _open(path, None)
    return metadata | own


def _open(
    path: Path, framework: str | None
) -> tuple[dict[str, str], dict[str, Any], dict[str, Array]]:
    """A safetensors file's metadata but for ours, ours, and the arrays, where a framework is given.

    PyTorch's are copied: they would change with the file, where another program writes over it. The
    file is mapped anew for each, so that what was read of it does not add up in memory.
    """
    check_regular(path)
    arrays: dict[str, Array] = {}
    try:
        # Python tells what keeps a file from being opened; and another may take its place meanwhile.
        with path.open("rb") as held:
            same = f"/dev/fd/{held.fileno()}"
            place = same if os.path.exists(same) else str(path)
            with safe_open(place, framework=framework or "np") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
            for name in names if framework is not None else ():
                with safe_open(place, framework=framework) as file:
                    x = file.get_tensor(name)
                    arrays[name] = x.clone() if is_torch_array(x) else x
                    del x
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); it may be cut short."
        ) from error
    except OSError as error:
        raise told(error, path, "not read") from error
    try:
        own = json.loads(metadata.pop(HEADER, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the header of {path} is not JSON ({error}); it is damaged.") from error
    if not isinstance(own, dict):
        raise ValueError(f"the header of {path} holds a {type(own).__name__}; it is damaged.")
    return metadata, own, arrays


def read_file(path: Path, framework: str) -> tuple[dict[str, Any], dict[str, Array]]:
    """What is told of a safetensors file's arrays, and the arrays, on the CPU.

    Args:
        path: file to read.
        framework: whose arrays, "pt" or "np".

    Raises:
        FileNotFoundError: no such file.
        OSError: it cannot be read.
        ValueError: it is not of this form, or does not have the digest in its header. Files of
            others have none, and are read as they are.
    """
    metadata, own, arrays = _open(path, framework)
    rest = {name: value for name, value in own.items() if name != "digest"}
    if "digest" in own and own["digest"] != digest(arrays, rest):
        raise ValueError(
            f"{path} is damaged: it does not have the digest that it was written with; take a copy "
            "of it, or write it again."
        )
    return metadata | own, arrays


def read_tensors(folder: Path, framework: str = "pt") -> dict[str, Array]:
    """Every tensor of model.safetensors, or of the shards that its index names, on the CPU.

    Args:
        folder: of the checkpoint.
        framework: whose arrays, "pt" or "np".

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
    tensors: dict[str, Array] = {}
    for name in sorted(set(files)):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{folder / name} is missing; expected a checkpoint's weights.")
        tensors |= read_file(folder / name, framework)[1]
    return tensors


def write_training(path: Path, tensors: dict[str, Array], told: dict[str, Any]) -> None:
    """Write a run's checkpoint, whole or not at all.

    Args:
        path: file to write.
        tensors: weights, and what the optimizer keeps.
        told: what else is told of the run, fit for JSON.
    """
    atomic_save(path, tensors, {**told, "kind": "training"})


def read_training(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """What `write_training` wrote: what is told of the run, and its tensors, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is cut short, damaged or foreign.
    """
    told, tensors = read_file(path, "pt")
    if told.get("kind") != "training":
        raise ValueError(
            f"{path} is no run's checkpoint (header {shown(told)}); give another folder."
        )
    return told, tensors


Layers = tuple[Array, ...]


def write_state(
    path: Path,
    model: str,
    counts: dict[str, np.ndarray],
    tensors: dict[str, Layers],
    weights: str | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write a stream's state to one safetensors file, whole or not at all.

    Args:
        path: file to write.
        model: fingerprint of the config that it belongs to.
        counts: [b] int64 each, stored as `count.NAME`.
        tensors: one a layer each, stored as `NAME.LAYER`.
        weights: digest of the weights that it was read with, or None.
        notes: what else the file tells, fit for JSON, or None.
    """
    named = {f"{name}.{i}": t for name, layers in tensors.items() for i, t in enumerate(layers)}
    for name, x in named.items():
        if not all_finite(x):
            raise ValueError(
                f"the state's {name} holds NaN or infinity, so nothing was written; the stream has "
                "left its dtype's range, so read again from an earlier state in a wider one."
            )
    whole = {f"count.{name}": count for name, count in counts.items()} | named
    header: dict[str, Any] = {"kind": "state", "version": 2, "model": model}
    more = {"weights": weights, "notes": notes}
    atomic_save(path, whole, header | {k: v for k, v in more.items() if v is not None})


def read_state(
    path: Path, counts: Collection[str], tensors: Collection[str], framework: str
) -> tuple[str, str | None, dict[str, np.ndarray], dict[str, Layers]]:
    """Read what `write_state` wrote: whole, finite, and nothing else; whether it fits a model is
    not asked.

    Args:
        path: file to read.
        counts, tensors: the names that a state has.
        framework: whose arrays, "pt" or "np".

    Returns:
        The fingerprint; the digest of the weights, or None; the counts; the tensors, of a name
        that is not there no layers.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state, or cut short.
    """
    header, found = read_file(path, framework)
    is_first = header.get("format") == "comet-state" and header.get("version") == "1"
    if not is_first and (header.get("kind"), header.get("version")) != ("state", 2):
        raise ValueError(
            f"{path} is not a CoMeT state (header {json.dumps(header)}); expected a file "
            "written by CoMeTState.save."
        )
    numbers = {}
    for name in counts:
        count = found.pop(f"count.{name}", None)
        if count is None or count.ndim != 1 or not len(count) or dtype_name(count) != "int64":
            raise ValueError(
                f"{path} lacks count.{name} as int64 of one dimension; it is not a whole state."
            )
        numbers[name] = to_host(count)
    grouped: dict[str, Layers] = {}
    for name in tensors:
        layers = range(sum(key.rpartition(".")[0] == name for key in found))
        if any(f"{name}.{i}" not in found for i in layers):
            raise ValueError(f"{path} lacks layers of {name}; it is not a whole state.")
        grouped[name] = tuple(found.pop(f"{name}.{i}") for i in layers)
    if found:
        raise ValueError(f"{path} holds {sorted(found)}, which no state has.")
    if not all(is_floating(t) for layers in grouped.values() for t in layers):
        raise ValueError(f"{path} holds tensors that are not floating; it is not a state.")
    if not all(all_finite(t) for layers in grouped.values() for t in layers):
        raise ValueError(f"{path} holds NaN or infinity; the stream was lost before it was saved.")
    return header.get("model", ""), header.get("weights"), numbers, grouped
