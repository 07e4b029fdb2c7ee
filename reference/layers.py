"""The decoder layer: RMSNorm, rotary grouped-query attention, SwiGLU, and the memories' adapter.

Shapes, no batch: n new slots, p slots of the row already read, d hidden, h query heads, k key and
value heads, e head width. Every function is analytic in its arrays: given complex input it returns
f(x + i y), so that a tiny imaginary step gives an exact derivative.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .config import BackboneConfig

__all__ = [
    "adapter",
    "attention",
    "decoder_layer",
    "linear",
    "merge_heads",
    "project_keys_values",
    "rms_norm",
    "rotary_frequencies",
    "rotary_table",
    "rotary_tables",
    "rotate",
    "sigmoid",
    "softmax",
    "split_heads",
    "swiglu",
]

Array = np.ndarray
Weights = dict[str, Any]
"""Arrays by name, nested."""


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), elementwise, written with tanh: finite for every x, and analytic."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def softmax(scores: Array, visible: Array) -> Array:
    """exp(scores) / sum(exp(scores)) over the visible part of the last axis.

    Args:
        scores: [..., p].
        visible: bool, broadcast against scores; every row sees something.

    Returns:
        [..., p], zero where not visible.
    """
    seen = np.where(visible, scores.real, -np.inf)
    highest = seen.max(axis=-1, keepdims=True, initial=-np.inf)  # initial: of no slots, for no rows
    shifted = np.where(visible, scores - highest, 0)
    weights = np.where(visible, np.exp(shifted), 0)
    return weights / weights.sum(axis=-1, keepdims=True)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """The linear map W x + b over the last axis.

    Args:
        x: [..., i].
        weight: [o, i].
        bias: [o] or None.

    Returns:
        [..., o].
    """
    product = x @ weight.T
    return product if bias is None else product + bias


def rms_norm(x: Array, weight: Array, eps: float | None) -> Array:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last axis.

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square; None is the machine epsilon of the dtype, float32 or wider.

    Returns:
        [..., d].

    Source: arXiv 1910.07467.
    """
    if eps is None:
        eps = float(np.finfo(x.dtype).eps)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def adapter(x: Array, weights: Weights) -> Array:
    """The low-rank residual adapter of each memory: x + A_up (A_down x).

    Args:
        x: [..., d].
        weights: "adapter_down" [rank, d] and "adapter_up" [d, rank].

    Returns:
        [..., d].
    """
    return x + linear(linear(x, weights["adapter_down"]), weights["adapter_up"])


def rotary_frequencies(config: BackboneConfig) -> Array:
    """Angle per position of every rotary pair: theta^(-2j / e), and its scalings.

    "linear" divides every frequency. "llama3" divides those that turn fewer than low_freq_factor
    times over the original context, keeps those that turn more than high_freq_factor times, and
    blends between.

    Returns:
        [e / 2] float64, radians per position.

    Source: RoFormer (arXiv 2104.09864); scalings as Hugging Face names them.
    """
    frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / scaling["factor"])
    return frequencies


def rotary_table(positions: Array, config: BackboneConfig) -> tuple[Array, Array]:
    """Cosine and sine of every position's angles.

    Args:
        positions: [n] integer, slots from the row's start.

    Returns:
        (cos, sin), each [n, e / 2] float64.
    """
    angles = positions[:, None] * rotary_frequencies(config)
    return np.cos(angles), np.sin(angles)


def rotary_tables(positions: Array, config: BackboneConfig) -> tuple[tuple[Array, Array], ...]:
    """The tables that a model's layers take: layer i takes `tables[i in config.unrotated_layers]`.

    A layer that does not rotate is one whose slots all stand at position 0: cosine 1, sine 0.

    Args:
        positions: as in `rotary_table`.

    Returns:
        The table of positions; where some layers do not rotate, theirs after it.
    """
    standing = [positions, 0 * positions] if config.unrotated_layers else [positions]
    return tuple(rotary_table(p, config) for p in standing)


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotary positions, half-rotation form: the pair (x_j, x_{j + e/2}) turns by its slot's angle.

    Args:
        x: [heads, n, e].
        rotation: (cos, sin), each [n, e / 2].

    Returns:
        [heads, n, e] in x's dtype.
    """
    cos, sin = (part.astype(x.real.dtype) for part in rotation)
    first, second = np.split(x, 2, axis=-1)  # [heads, n, e / 2] each
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def split_heads(x: Array, num_heads: int) -> Array:
    """[n, heads * e] -> [heads, n, e]."""
    return x.reshape(len(x), num_heads, x.shape[-1] // num_heads).transpose(1, 0, 2)


def merge_heads(x: Array) -> Array:
    """[heads, n, e] -> [n, heads * e]."""
    return x.transpose(1, 0, 2).reshape(x.shape[1], x.shape[0] * x.shape[2])


def attention(queries: Array, keys: Array, values: Array, positions: Array) -> Array:
    """softmax(<Q, K> / sqrt(e)) V, a slot seeing every slot of its row up to itself.

    Args:
        queries: [h, n, e] of the new slots, rotated.
        keys, values: [k, l, e] of the whole row, its l = p + n slots; h is a multiple of k, and
            query head j reads key head j // (h / k).
        positions: [n], positions of the new slots; a key's index is its position.

    Returns:
        [h, n, e].
    """
    group = len(queries) // len(keys)
    keys, values = keys.repeat(group, axis=0), values.repeat(group, axis=0)  # [h, l, e]
    scores = queries @ keys.transpose(0, 2, 1) / math.sqrt(queries.shape[-1])  # [h, n, l]
    visible = np.arange(keys.shape[1]) <= positions[:, None]  # [n, l]
    return softmax(scores, visible) @ values


def swiglu(x: Array, weights: Weights) -> Array:
    """M_down (silu(M_gate x) * M_up x), with silu(y) = y * sigmoid(y).

    Args:
        x: [..., d].
        weights: "gate_proj" and "up_proj" [f, d], "down_proj" [d, f].

    Returns:
        [..., d].

    Source: arXiv 2002.05202.
    """
    gated = linear(x, weights["gate_proj"])
    product = gated * sigmoid(gated) * linear(x, weights["up_proj"])
    return linear(product, weights["down_proj"])


def project_keys_values(
    normed: Array, rotation: tuple[Array, Array], weights: Weights, config: BackboneConfig
) -> tuple[Array, Array]:
    """Keys (normed per head in Qwen3, then rotated) and values of slots.

    Args:
        normed: [n, d], after the layer's input norm.
        rotation: (cos, sin) of the slots' positions.
        weights: "k_proj", "v_proj", and as configured "k_bias", "v_bias", "k_norm".

    Returns:
        keys, values, each [k, n, e].
    """
    keys = linear(normed, weights["k_proj"], weights.get("k_bias"))
    values = linear(normed, weights["v_proj"], weights.get("v_bias"))
    keys = split_heads(keys, config.num_key_value_heads)
    if config.qk_norm:
        keys = rms_norm(keys, weights["k_norm"], config.rms_norm_eps)
    return rotate(keys, rotation), split_heads(values, config.num_key_value_heads)


def decoder_layer(
    hidden: Array,
    keys: Array,
    values: Array,
    positions: Array,
    rotation: tuple[Array, Array],
    weights: Weights,
    config: BackboneConfig,
) -> tuple[Array, Array, Array]:
    """One pre-norm decoder layer over new slots of a row:
    x + attention(rms_norm(x)), then x + swiglu(rms_norm(x)).

    Args:
        hidden: [n, d], the new slots.
        keys, values: [k, p, e], the row so far at this layer.
        positions: [n], p ... p + n - 1.
        rotation: (cos, sin) of those positions, see `rotary_table`.
        weights: one layer's arrays.

    Returns:
        hidden [n, d], keys and values [k, p + n, e] of the row with the new slots.
    """
    normed = rms_norm(hidden, weights["input_layernorm"], config.rms_norm_eps)
    queries = linear(normed, weights["q_proj"], weights.get("q_bias"))
    queries = split_heads(queries, config.num_attention_heads)
    if config.qk_norm:
        queries = rms_norm(queries, weights["q_norm"], config.rms_norm_eps)
    queries = rotate(queries, rotation)
    new_keys, new_values = project_keys_values(normed, rotation, weights, config)
    keys = np.concatenate([keys, new_keys], axis=1)
    values = np.concatenate([values, new_values], axis=1)
    mixed = merge_heads(attention(queries, keys, values, positions))
    hidden = hidden + linear(mixed, weights["o_proj"])
    normed = rms_norm(hidden, weights["post_attention_layernorm"], config.rms_norm_eps)
    return hidden + swiglu(normed, weights), keys, values
