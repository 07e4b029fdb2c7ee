"""Weights as a tree of named tensors: twin of `reference/parameters.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reference import parameters as specification
from reference.config import CoMeTConfig

__all__ = [
    "ParameterTree",
    "initialize",
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
                # What was made under inference mode could not be trained.
                own = value.clone() if value.is_inference() else value
                self.register_parameter(str(name), nn.Parameter(own))

    def __getitem__(self, name: str | int) -> Any:
        name = str(name)
        found = self._parameters.get(name)  # getattr would look everywhere else first
        return getattr(self, name) if found is None else found

    def get(self, name: str) -> Any:
        """What has that name, or None."""
        return self[name] if name in self.names else None

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
