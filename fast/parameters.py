"""Weights as a tree of named tensors: twin of `reference/parameters.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reference import parameters as specification
from reference.config import CoMeTConfig
from reference.parameters import named_parameters, shapes

__all__ = [
    "ParameterTree",
    "check_weights",
    "fuse",
    "initialize",
    "pack",
    "to_arrays",
    "to_tensors",
]


class ParameterTree(nn.Module):
    """A nested dict of tensors as a module: read like the dict, trained like a module.

    `tree["layers"][0]["q_proj"]` is a parameter, and `layers.0.q_proj` is its name in
    `named_parameters` and in a checkpoint: the reference's names.
    """

    def __init__(self, tree: dict[str, Any] | list[Any]) -> None:
        super().__init__()
        items = enumerate(tree) if isinstance(tree, list) else tree.items()
        self.names = []
        for name, value in items:
            self.names.append(name)
            if isinstance(value, (dict, list)):
                self.add_module(str(name), ParameterTree(value))
            else:
                self.register_parameter(str(name), nn.Parameter(value))

    def __getitem__(self, name: str | int) -> Any:
        return getattr(self, str(name))

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        return (self[name] for name in self.names)


def initialize(config: CoMeTConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Fresh weights, the reference's, as float32 tensors. Twin of
    `reference.parameters.initialize`.
    """
    return to_tensors(specification.initialize(config, rng), torch.float32)


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "qkv_bias": ("q_bias", "k_bias", "v_bias"),
    "kv_proj": ("k_proj", "v_proj"),
    "kv_bias": ("k_bias", "v_bias"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Products of one input that can be one product: its name, and the weights under each other. A
group that is part of another stands behind it."""


def pack(params: ParameterTree) -> None:
    """Lay the weights that can be used as one side by side in memory, their values unchanged.

    Args:
        params: a model's; its tensors are moved, one group of a layer at a time.
    """
    for weights in params["layers"]:
        for names in FUSED.values():
            if names[0] in weights and _joined([weights[name] for name in names]) is None:
                whole = torch.cat([weights[name].data for name in names])
                parts = whole.split([len(weights[name]) for name in names])
                for name, part in zip(names, parts, strict=True):
                    weights[name].data = part


def fuse(params: ParameterTree) -> dict[str, Any]:
    """The weights with those that `pack` laid side by side as one, for reading without gradient.

    Three products of one input are one larger product of the same sums. What is joined is memory
    that lies in order, so that nothing is copied and the parts stay the model's parameters. What
    it is worth is in docs/performance.md.

    Args:
        params: a model's.

    Returns:
        Nested dict: the tensors by their names, and each layer's of `FUSED` too, where its parts
        still lie as `pack` laid them.
    """
    layers = []
    for weights in params["layers"]:
        tensors = {name: weights[name] for name in weights.names}
        for fused, names in FUSED.items():
            whole = _joined([tensors[name] for name in names]) if names[0] in tensors else None
            if whole is not None:
                tensors[fused] = whole
        layers.append(tensors)
    return {str(name): params[name] for name in params.names} | {"layers": layers}


def _joined(parts: list[Tensor]) -> Tensor | None:
    """The tensor whose rows are the parts' rows, without a copy; None where they lie apart."""
    first, rows, end = parts[0].detach(), 0, parts[0].storage_offset()
    for part in parts:
        together = part.untyped_storage() is first.untyped_storage()
        if not (together and part.is_contiguous() and part.storage_offset() == end):
            return None
        rows, end = rows + len(part), end + part.numel()
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def check_weights(weights: dict[str, Any], config: CoMeTConfig) -> None:
    """Raise unless weights are whole, fit a config, and are finite numbers of one dtype.

    Args:
        weights: nested dict of tensors.
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
    dtype = found["norm"].dtype
    for name, shape in expected.items():
        tensor = found[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, the config says {shape}; the weights are "
                "of another model, or the config was changed."
            )
        if tensor.dtype != dtype or not tensor.dtype.is_floating_point:
            raise ValueError(
                f"{name} is {tensor.dtype} where norm is {dtype}; convert all to one float dtype."
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinity; the file is damaged or its training diverged."
            )


def to_tensors(tree: Any, dtype: torch.dtype) -> Any:
    """A nested dict of arrays as the same of tensors, copied."""
    if isinstance(tree, dict):
        return {name: to_tensors(value, dtype) for name, value in tree.items()}
    if isinstance(tree, list):
        return [to_tensors(value, dtype) for value in tree]
    return torch.tensor(np.asarray(tree), dtype=dtype)


def to_arrays(tree: Any) -> Any:
    """A nested dict or `ParameterTree` of tensors as a nested dict of arrays."""
    if isinstance(tree, ParameterTree):
        values = [to_arrays(value) for value in tree]
        is_list = bool(tree.names) and isinstance(tree.names[0], int)
        return values if is_list else dict(zip(tree.names, values, strict=True))
    if isinstance(tree, Tensor):
        return tree.detach().cpu().numpy()
    if isinstance(tree, list):
        return [to_arrays(value) for value in tree]
    return {name: to_arrays(value) for name, value in tree.items()}
