"""Weights as a tree of named tensors: twin of `reference/parameters.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reference import parameters as specification
from reference.config import CoMeTConfig

from .cells import run_layer

__all__ = [
    "Layer",
    "ParameterTree",
    "Vector",
    "initialize",
    "to_arrays",
    "to_tensors",
]


class ParameterTree(nn.Module):
    """A nested dict of tensors as a module: read like the dict, trained like a module.

    What multiplies is a leaf module, so that hooks, PEFT's adapters and quantisers find it:
    `tree["layers"][0]["q_proj"]` is an `nn.Linear`, which holds "q_bias" too where there is one.
    Embeddings are modules as well, norms are parameters. What takes a module's place is called in
    its place.
    """

    def __init__(self, tree: dict[str, Any] | list[Any]) -> None:
        super().__init__()
        branch = Layer if isinstance(tree, list) else ParameterTree
        self.names: list[Any] = []
        for key, value in enumerate(tree) if isinstance(tree, list) else tree.items():
            self.names.append(key)
            name = str(key)
            if isinstance(value, (dict, list)):
                self.add_module(name, branch(value))
                continue
            # What was made under inference mode could not be trained.
            leaf = nn.Parameter(value.clone() if value.is_inference() else value)
            if name.endswith("_bias"):
                self._owner(name).bias = leaf
            elif leaf.dim() == 2 or name == "compression_embedding":
                self.add_module(name, _module(name, leaf))
            else:
                self.register_parameter(name, leaf)

    @property
    def in_use(self) -> ParameterTree:
        """The tree itself; of a tree that PEFT has wrapped to train a copy, the copy."""
        return self

    def __getitem__(self, name: str | int) -> Any:
        name = str(name)
        found: Any = self._parameters.get(name)  # getattr would look everywhere else first
        if found is None:
            found = self._modules.get(name)
            if found is None:
                if name not in self.names:
                    raise KeyError(name)
                return self._owner(name).bias
            if type(found) not in PLAIN:
                return getattr(found, "in_use", found)
        return found

    def get(self, name: str) -> Any:
        """What has that name, or None."""
        return self[name] if name in self.names else None

    def _owner(self, name: str) -> Any:
        """The module that holds a bias: "q_bias" is of "q_proj", "gate_bias" of "gate"."""
        stem = name.removesuffix("_bias")
        return self._modules.get(stem) or self._modules[f"{stem}_proj"]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Any]:
        return (self[name] for name in self.names)

    def to_dict(self, prefix: str = "") -> Any:
        """The nested dict of the tensors themselves, under the reference's names.

        Args:
            prefix: of the names in a message.

        Raises:
            ValueError: something has taken a module's place, whose numbers are not one tensor.
        """
        found: dict[str | int, Any] = {}
        for name in self.names:
            value = self[name]
            if isinstance(value, ParameterTree):
                value = value.to_dict(f"{prefix}{name}.")
            elif type(value) in PLAIN:
                value = value.weight
            elif not isinstance(value, Tensor):
                raise ValueError(
                    f"{prefix}{name} is a {type(value).__module__}.{type(value).__name__}, not one "
                    "tensor; merge it or take it out first (of PEFT: merge_and_unload)."
                )
            found[name] = value
        is_list = bool(self.names) and isinstance(self.names[0], int)
        return list(found.values()) if is_list else found


class Layer(ParameterTree):
    """A layer's weights. To call it is `cells.run_layer` with them, so that its hooks fire."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """See `cells.run_layer`."""
        return run_layer(hidden, *args, weights=self, **kwargs)


class Vector(nn.Module):
    """A leaf that is one vector, as a module, so that PEFT can train and save it."""

    weight: Tensor


PLAIN = (nn.Linear, nn.Embedding, Vector)
"""Leaf modules, whose numbers are one tensor, and a bias."""


def _module(name: str, weight: nn.Parameter) -> nn.Module:
    """The leaf module of that name around a weight."""
    module: nn.Module
    if weight.dim() == 1:
        module = Vector()
    elif name in ("embed_tokens", "readout_embeddings"):
        module = nn.Embedding.from_pretrained(weight.detach(), freeze=False)
    else:  # on "meta", so that it draws no numbers of its own
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    module.weight = weight
    return module


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
        return to_arrays(tree.to_dict())
    if isinstance(tree, Tensor):
        return tree.detach().cpu().numpy()
    if isinstance(tree, list):
        return [to_arrays(value) for value in tree]
    return {name: to_arrays(value) for name, value in tree.items()}
