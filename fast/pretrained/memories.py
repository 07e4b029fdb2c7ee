"""The memories' own weights in a file of their own: what was trained, without the backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.config import CoMeTConfig
from reference.parameters import map_parameters, named_parameters, shapes

from ..arrays import shown
from ..checkpoints import named_tensors, of_file, read_file, refuse_broken
from ..files import atomic_save
from .backbones import backbone_shapes

__all__ = ["load_memories", "memory_names", "put_memories", "save_memories"]

SIGN = "backbone.norm"
"""Name in the file of the backbone's last norm, by which it is known."""

ROUNDING = 2.0**-7
"""What a dtype may change of a number of it, relative: bfloat16's rounding."""


def memory_names(config: CoMeTConfig) -> list[str]:
    """Our names of the weights that are not the backbone's."""
    theirs = backbone_shapes(config.backbone)
    return [name for name in named_parameters(shapes(config)) if name not in theirs]


def save_memories(path: Path, config: CoMeTConfig, weights: Any) -> None:
    """Write the memories' weights and the config to one safetensors file, whole or not at all.

    Args:
        weights: nested dict or `ParameterTree` of tensors, the backbone's among them.

    Raises:
        ValueError: a weight holds NaN or infinity; nothing is written.
    """
    tensors = named_tensors(config, weights)
    kept = {name: tensors[name] for name in memory_names(config)} | {SIGN: tensors["norm"]}
    refuse_broken(kept)
    atomic_save(path, kept, {"kind": "memories", "config": config.to_dict()})


def load_memories(path: Path) -> tuple[CoMeTConfig, dict[str, Tensor]]:
    """What `save_memories` wrote: the config, and tensors on the CPU by name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is cut short or damaged, or holds something else.
    """
    header, tensors = read_file(path, "pt")
    if header.get("kind") != "memories" or not isinstance(header.get("config"), dict):
        raise ValueError(
            f"{path} holds no memories (header {shown(header)}); expected a file written by "
            "CoMeTModel.save_memories."
        )
    with of_file(path):
        config = CoMeTConfig.from_dict(header["config"])
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {SIGN: (config.backbone.hidden_size,)}
    if config.backbone.num_hidden_layers <= len(found):  # before a list of that length is made
        sizes = named_parameters(shapes(config))
        expected |= {name: sizes[name] for name in memory_names(config)}
    if found != expected:
        wrong = sorted(
            name for name in {*found, *expected} if found.get(name) != expected.get(name)
        )
        raise ValueError(f"{path} holds {wrong[:4]} otherwise than its config says; it is damaged.")
    return config, tensors


def put_memories(path: Path, config: CoMeTConfig, weights: dict[str, Any]) -> dict[str, Any]:
    """A model's weights with the memories of a file in place of its own.

    Args:
        path: of `save_memories`.
        config: the model's.
        weights: nested dict of its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not readable, or the memories are of another backbone.
    """
    trained_with, tensors = load_memories(path)
    named = named_parameters(weights)
    sign, norm = tensors.pop(SIGN).double(), named["norm"].double()
    if trained_with != config or not torch.allclose(sign, norm, rtol=2 * ROUNDING, atol=0):
        raise ValueError(
            f"the memories of {path} were trained with another backbone, which has other "
            f"{'sizes' if trained_with != config else 'weights'}; give the one that they belong to."
        )
    return map_parameters(
        lambda name, x: tensors[name].to(x.dtype) if name in tensors else x, weights
    )
