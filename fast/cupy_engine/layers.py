"""The decoder layer on arrays: twin of `reference/layers.py`, with a batch axis in front.

Shapes: b sequences, n new slots, p slots of the row already read, d hidden, h query heads,
k key and value heads, e head width. Indices and positions are [r, ...]: r is 1 where all sequences
are alike, else b. In half types, norms, activations and attention are computed in float32 and
rounded once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from reference.config import BackboneConfig
from reference.layers import rotary_frequencies

from ..arrays import HALF_TYPES, Array, dtype_name
from .operations import operation

__all__ = [
    "adapter",
    "append_slots",
    "attention",
    "causal_mask",
    "choose",
    "decoder_layer",
    "linear",
    "merge_heads",
    "narrow",
    "project_keys_values",
    "project_memory",
    "project_queries",
    "rms_norm",
    "rotary_table",
    "rotary_tables",
    "rotate",
    "sigmoid",
    "silu_product",
    "softmax",
    "split_heads",
    "swiglu",
    "take_slots",
    "widen",
]

Weights = Any
"""Arrays by name, nested dicts and lists."""

Rotation = tuple[Array, Array]


def widen(x: Array) -> Array:
    """Float32 where the dtype is narrower, else x itself."""
    xp = array_namespace(x)
    return xp.astype(x, xp.float32) if dtype_name(x) in HALF_TYPES else x


def narrow(x: Array, like: Array) -> Array:
    """X in another array's dtype."""
    return array_namespace(x).astype(x, like.dtype, copy=False)


def choose(condition: Array, x: Array, y: Array) -> Array:
    """X where the condition holds, else y, in their dtype: of two bfloat16 arrays, CuPy's `where`
    makes float32.
    """
    return narrow(array_namespace(x).where(condition, x, y), x)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), elementwise. Twin of `reference.layers.sigmoid`."""
    return 0.5 * (1.0 + array_namespace(x).tanh(0.5 * x))


def softmax(scores: Array, visible: Array) -> Array:
    """exp(scores) / sum(exp(scores)) over the visible part of the last axis. Twin of
    `reference.layers.softmax`.

    Args:
        scores: [..., p], float32 or wider.
        visible: bool, broadcast against scores; every row sees something.

    Returns:
        [..., p], zero where not visible.
    """
    xp = array_namespace(scores)
    seen = xp.where(visible, scores, -xp.inf)
    weights = xp.exp(seen - xp.max(seen, axis=-1, keepdims=True))
    return weights / xp.sum(weights, axis=-1, keepdims=True)


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """The linear map W x + b over the last axis. Twin of `reference.layers.linear`.

    Args:
        x: [..., i] any float dtype.
        weight: [o, i] of the same dtype.
        bias: [o] or None.

    Returns:
        [..., o].
    """
    if callable(weight):  # a module of PyTorch's: a recorder watches its model
        return weight(x)
    xp = array_namespace(x)
    # One product of matrices, not a small one for each sequence.
    rows = xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))
    product = narrow(rows @ weight.T, x)  # NumPy's product of bfloat16 is float32
    product = xp.reshape(product, (*x.shape[:-1], weight.shape[0]))
    return product if bias is None else product + bias


@operation
def rms_norm(x: Array, weight: Array, eps: float | None) -> Array:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last axis. Twin of
    `reference.layers.rms_norm`.

    Args:
        x: [..., d] any float dtype; the statistic is computed in float32 or wider.
        weight: [d].
        eps: added to the mean square; None is the computing dtype's machine epsilon.

    Returns:
        [..., d] in x's dtype.
    """
    xp, wide = array_namespace(x), widen(x)
    if eps is None:
        eps = float(xp.finfo(wide.dtype).eps)
    mean = xp.mean(wide * wide, axis=-1, keepdims=True)
    return narrow(wide / xp.sqrt(mean + eps), x) * weight


def adapter(x: Array, weights: Weights) -> Array:
    """The low-rank residual adapter: x + A_up (A_down x). Twin of `reference.layers.adapter`.

    Args:
        x: [..., d].
        weights: "adapter_down" [rank, d] and "adapter_up" [d, rank].

    Returns:
        [..., d].
    """
    return x + linear(linear(x, weights["adapter_down"]), weights["adapter_up"])


def rotary_table(positions: np.ndarray, config: BackboneConfig, like: Array) -> Rotation:
    """Cosine and sine of every position's angles. Twin of `reference.layers.rotary_table`.

    Args:
        positions: [r, n] integer, on the host, so that no device needs float64.
        config: the backbone.
        like: an array of the model.

    Returns:
        (cos, sin), each [r, n, e / 2], on its device, in its dtype or float32 if that is narrower.
    """
    xp, dtype = array_namespace(like), widen(like[..., :0]).dtype
    angles = positions[..., None] * rotary_frequencies(config)
    where = device(like)
    return (
        xp.asarray(np.cos(angles), dtype=dtype, device=where),
        xp.asarray(np.sin(angles), dtype=dtype, device=where),
    )


def rotary_tables(
    positions: np.ndarray, config: BackboneConfig, like: Array
) -> tuple[Rotation, ...]:
    """The tables that a model's layers take: layer i takes `tables[i in config.unrotated_layers]`.
    Twin of `reference.layers.rotary_tables`.

    Args:
        positions, like: as in `rotary_table`.

    Returns:
        The table of positions; where some layers do not rotate, theirs after it.
    """
    standing = [positions, 0 * positions] if config.unrotated_layers else [positions]
    return tuple(rotary_table(p, config, like) for p in standing)


@operation
def rotate(x: Array, rotation: Rotation) -> Array:
    """Rotary positions, half-rotation form. Twin of `reference.layers.rotate`.

    Args:
        x: [b, heads, n, e].
        rotation: (cos, sin), each [r, n, e / 2], float32 or wider.

    Returns:
        [b, heads, n, e] in x's dtype: pairs (x_j, x_{j + e/2}) turned by their slot's angles.
    """
    cos, sin = (part[:, None, :, :] for part in rotation)
    half, wide = x.shape[-1] // 2, widen(x)
    first, second = wide[..., :half], wide[..., half:]  # [b, heads, n, e / 2] each
    turned = [first * cos - second * sin, second * cos + first * sin]
    return narrow(array_namespace(x).concat(turned, axis=-1), x)


def split_heads(x: Array, num_heads: int) -> Array:
    """[b, n, heads * e] -> [b, heads, n, e]. Twin of `reference.layers.split_heads`."""
    xp, (b, n, width) = array_namespace(x), x.shape
    return xp.permute_dims(xp.reshape(x, (b, n, num_heads, width // num_heads)), (0, 2, 1, 3))


def merge_heads(x: Array) -> Array:
    """[b, heads, n, e] -> [b, n, heads * e]. Twin of `reference.layers.merge_heads`."""
    xp, (b, heads, n, e) = array_namespace(x), x.shape
    return xp.reshape(xp.permute_dims(x, (0, 2, 1, 3)), (b, n, heads * e))


def take_slots(x: Array, index: Array) -> Array:
    """Some slots of every sequence, [b, n, ...] -> [b, a, ...]. Twin of `fast.layers.take_slots`.

    Args:
        x: [b, n] or [b, n, d].
        index: [r, a] int64.

    Returns:
        [b, a, ...], in the order of the index.
    """
    xp = array_namespace(x)
    if index.shape[0] == 1:
        return xp.take(x, index[0, :], axis=1)
    if x.ndim == 3:
        index = xp.broadcast_to(index[:, :, None], (*index.shape, x.shape[2]))
    return xp.take_along_axis(x, index, axis=1)


def append_slots(past: Array, new: Array, positions: Array) -> Array:
    """Keys or values of a row with those of its new slots: index = position in the row. Twin of
    `fast.layers.append_slots`.

    Args:
        past: [b, k, p, e], the row so far.
        new: [b, k, n, e].
        positions: [r, n]; where r is 1 they continue at p, else each row continues at its own
            length.

    Returns:
        [b, k, p + n, e]: after a row's own length, any finite value.
    """
    xp = array_namespace(past)
    both = xp.concat([past, new], axis=2)
    if positions.shape[0] == 1 or not new.shape[2]:
        return both
    slot = xp.arange(both.shape[2], dtype=positions.dtype, device=device(both))[None, :]  # [1, l]
    start, gap = positions[:, :1], past.shape[2] - positions[:, :1]
    source = xp.where(slot < start, slot, xp.minimum(slot + gap, xp.max(slot)))
    source = xp.broadcast_to(source[:, None, :, None], both.shape)
    return xp.take_along_axis(both, source, axis=2)


def causal_mask(positions: Array, length: int) -> Array:
    """What each new slot sees of its row: every slot up to itself.

    Args:
        positions: [r, n], positions of the new slots.
        length: slots of the row, the new ones included.

    Returns:
        [r, 1, n, length] bool.
    """
    xp = array_namespace(positions)
    slots = xp.arange(length, dtype=positions.dtype, device=device(positions))
    return slots <= positions[:, None, :, None]


@operation
def attention(queries: Array, keys: Array, values: Array, positions: Array) -> Array:
    """softmax(<Q, K> / sqrt(e)) V, a slot seeing every slot up to itself. Twin of
    `reference.layers.attention`.

    Args:
        queries: [b, h, n, e] of the new slots, rotated.
        keys, values: [b, k, l, e] of the whole row; h is a multiple of k.
        positions: [r, n], positions of the new slots; a key's index is its position.

    Returns:
        [b, h, n, e].
    """
    xp, (b, h, n, e), k = array_namespace(queries), queries.shape, keys.shape[1]
    mask = causal_mask(positions, keys.shape[2])
    grouped = xp.reshape(widen(queries), (b, k, h // k, n, e))  # the heads of a key side by side
    wide_keys, wide_values = widen(keys)[:, :, None, :, :], widen(values)[:, :, None, :, :]
    scores = grouped @ xp.matrix_transpose(wide_keys) / math.sqrt(e)  # [b, k, g, n, l]
    mixed = softmax(scores, mask[:, :, None, :, :]) @ wide_values
    return narrow(xp.reshape(mixed, (b, h, n, e)), queries)


@operation
def silu_product(gate: Array, up: Array) -> Array:
    """The SwiGLU product: silu(gate) * up, elementwise.

    Args:
        gate, up: [..., f].

    Returns:
        [..., f].
    """
    wide = widen(gate)
    return narrow(wide * sigmoid(wide), gate) * up


def swiglu(x: Array, weights: Weights) -> Array:
    """M_down (silu(M_gate x) * M_up x). Twin of `reference.layers.swiglu`.

    Args:
        x: [..., d].
        weights: "gate_proj" and "up_proj" [f, d], "down_proj" [d, f].

    Returns:
        [..., d].
    """
    product = silu_product(linear(x, weights["gate_proj"]), linear(x, weights["up_proj"]))
    return linear(product, weights["down_proj"])


def project_keys_values(
    normed: Array, rotation: Rotation, weights: Weights, config: BackboneConfig
) -> tuple[Array, Array]:
    """Keys (rotated) and values of slots. Twin of `reference.layers.project_keys_values`.

    Args:
        normed: [b, n, d], after the layer's input norm.
        rotation: (cos, sin) of the slots' positions.
        weights: "k_proj", "v_proj", and as configured "k_bias", "v_bias", "k_norm".

    Returns:
        keys, values, each [b, k, n, e].
    """
    keys = linear(normed, weights["k_proj"], weights.get("k_bias"))
    values = linear(normed, weights["v_proj"], weights.get("v_bias"))
    heads = config.num_key_value_heads
    keys = _turned_heads(keys, heads, weights.get("k_norm"), rotation, config)
    return keys, split_heads(values, heads)


def project_queries(
    normed: Array, rotation: Rotation, weights: Weights, config: BackboneConfig
) -> Array:
    """Queries (rotated) of slots: rotate(norm_q(W_q u + b_q)). Twin of
    `fast.layers.project_queries`.

    Args:
        normed, rotation: as in `project_keys_values`.
        weights: "q_proj", and as configured "q_bias", "q_norm".

    Returns:
        [b, h, n, e].
    """
    queries = linear(normed, weights["q_proj"], weights.get("q_bias"))
    heads = config.num_attention_heads
    return _turned_heads(queries, heads, weights.get("q_norm"), rotation, config)


def _turned_heads(
    x: Array, num_heads: int, norm: Array | None, rotation: Rotation, config: BackboneConfig
) -> Array:
    """[b, n, heads * e] -> [b, heads, n, e], normed where there is a norm, and rotated."""
    heads = split_heads(x, num_heads)
    if norm is not None:
        heads = rms_norm(heads, norm, config.rms_norm_eps)
    return rotate(heads, rotation)


def project_memory(
    memory: Array, rotation: Rotation, weights: Weights, config: BackboneConfig
) -> tuple[Array, Array]:
    """Memory slots as keys and values, which is all a row ever needs of them. Twin of
    `fast.layers.project_memory`.

    Args:
        memory: [b, slots, d], global then temporary memory.
        rotation: (cos, sin) of positions 0 .. slots - 1.

    Returns:
        keys, values, each [b, k, slots, e].
    """
    normed = rms_norm(memory, weights["input_layernorm"], config.rms_norm_eps)
    return project_keys_values(normed, rotation, weights, config)


def decoder_layer(
    hidden: Array,
    keys: Array,
    values: Array,
    positions: Array,
    rotation: Rotation,
    weights: Weights,
    config: BackboneConfig,
    queried: Array | None = None,
) -> tuple[Array, Array, Array]:
    """One pre-norm decoder layer over new slots of a row. Twin of
    `reference.layers.decoder_layer`.

    Args:
        hidden: [b, n, d], the new slots.
        keys, values: [b, k, p, e], the row so far at this layer.
        positions: [r, n], see `append_slots`.
        rotation: (cos, sin) of those positions, see `rotary_table`.
        weights: one layer's arrays.
        queried: [r, a] int64, the new slots that get a query, and so an output; None is all.

    Returns:
        hidden [b, n or a, d], keys and values [b, k, p + n, e] of the row with the new slots.
    """
    normed = rms_norm(hidden, weights["input_layernorm"], config.rms_norm_eps)
    new_keys, new_values = project_keys_values(normed, rotation, weights, config)
    keys = append_slots(keys, new_keys, positions)
    values = append_slots(values, new_values, positions)
    if queried is not None:
        hidden, normed, positions, cos, sin = (
            take_slots(x, queried) for x in (hidden, normed, positions, *rotation)
        )
        rotation = cos, sin
    queries = project_queries(normed, rotation, weights, config)
    mixed = merge_heads(attention(queries, keys, values, positions))
    hidden = hidden + linear(mixed, weights["o_proj"])
    normed = rms_norm(hidden, weights["post_attention_layernorm"], config.rms_norm_eps)
    return hidden + swiglu(normed, weights), keys, values
