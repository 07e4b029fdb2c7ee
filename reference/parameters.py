"""Weights as plain nested dicts of arrays: their names, shapes, and random start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .config import CoMeTConfig

__all__ = ["initialize", "map_parameters", "named_parameters", "shapes"]


def shapes(config: CoMeTConfig) -> dict[str, Any]:
    """Name and shape of every weight of a model.

    Every projection is [out, in]. Names within a layer are Hugging Face's, with `.weight` left
    out and `.bias` written `_bias`.

    Returns:
        Nested dict; "layers" is a list; leaves are tuples of ints.
    """
    b, mem = config.backbone, config.memory
    d, f, e = b.hidden_size, b.intermediate_size, b.head_dim
    queries, keys = b.num_attention_heads * e, b.num_key_value_heads * e
    layer: dict[str, Any] = {
        "input_layernorm": (d,),
        "q_proj": (queries, d),
        "k_proj": (keys, d),
        "v_proj": (keys, d),
        "o_proj": (d, queries),
        "post_attention_layernorm": (d,),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
    }
    if b.attention_bias:
        layer |= {"q_bias": (queries,), "k_bias": (keys,), "v_bias": (keys,)}
    if b.qk_norm:
        layer |= {"q_norm": (e,), "k_norm": (e,)}
    adapter = {"adapter_down": (mem.adapter_rank, d), "adapter_up": (d, mem.adapter_rank)}
    if mem.has_global:
        gates = 1 if mem.gate == "scalar" else d
        layer["global_memory"] = {"norm": (d,), "gate": (gates, 2 * d), **adapter}
        if mem.gate_bias:
            layer["global_memory"]["gate_bias"] = (gates,)
        if mem.sink_slot:
            layer["global_memory"]["sink"] = (d,)
    if mem.has_temporary:
        layer["temporary_memory"] = {"norm": (d,), **adapter}

    tree: dict[str, Any] = {"embed_tokens": (b.vocab_size, d)}
    if mem.has_temporary:
        tree["compression_embedding"] = (d,)
    if mem.has_global:
        tree["readout_embeddings"] = (mem.global_memory_size, d)
    tree["layers"] = [layer for _ in range(b.num_hidden_layers)]
    tree["norm"] = (d,)
    if not b.tie_word_embeddings:
        tree["lm_head"] = (b.vocab_size, d)
    return tree


def map_parameters(function: Callable[[str, Any], Any], tree: Any, name: str = "") -> Any:
    """The same nested dict with `function(name, leaf)` at every leaf.

    Args:
        function: called with the dotted name ("layers.0.q_proj") and the leaf.
        tree: nested dict and lists.

    Returns:
        A new tree of the same form.
    """
    dotted = f"{name}." if name else ""
    if isinstance(tree, dict):
        return {k: map_parameters(function, v, f"{dotted}{k}") for k, v in tree.items()}
    if isinstance(tree, list):
        return [map_parameters(function, v, f"{dotted}{i}") for i, v in enumerate(tree)]
    return function(name, tree)


def named_parameters(tree: Any) -> dict[str, Any]:
    """Flat dict from dotted name to leaf, in the order of `shapes`."""
    flat: dict[str, Any] = {}
    map_parameters(lambda name, leaf: flat.__setitem__(name, leaf), tree)
    return flat


def initialize(config: CoMeTConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Random weights to start training from.

    Norms start at one, biases at zero, everything else at N(0, 0.02), A_up of the adapters
    included, as in the published code.

    Args:
        config: the model.
        rng: source of the numbers: the same seed gives the same weights.

    Returns:
        Nested dict of float64 arrays with the names and shapes of `shapes`.
    """

    def start(name: str, shape: Any) -> np.ndarray:
        leaf = name.rsplit(".", 1)[-1]
        if leaf.endswith("norm"):
            return np.ones(shape)
        if leaf.endswith("bias"):
            return np.zeros(shape)
        return rng.normal(0.0, 0.02, shape)

    return map_parameters(start, shapes(config))
