"""The decoder layer in PyTorch: twin of `reference/layers.py`, with a batch axis in front.

Shapes: b sequences, n new slots, p slots of the row already read, d hidden, h query heads,
k key and value heads, e head width. Indices and positions are [r, ...]: r is 1 where all sequences
are alike, else b. Statistics of norms and rotary tables are computed in
float32 or wider and cast back, whatever the model's dtype.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from reference.config import BackboneConfig

from .attention import attend_after

__all__ = [
    "adapter",
    "append_slots",
    "attention",
    "causal_mask",
    "decoder_layer",
    "for_heads",
    "linear",
    "look_up",
    "merge_heads",
    "of_pairs",
    "project_keys_values",
    "project_memory",
    "project_queries",
    "put_slots",
    "rms_norm",
    "rotary_frequencies",
    "rotary_table",
    "rotary_tables",
    "rotate",
    "sigmoid",
    "split_heads",
    "swiglu",
    "take_slots",
    "tensor_of",
    "widen",
]

Weights = Any
"""Tensors by name, nested: a dict, or the `ParameterTree` of a model, which holds modules."""


def widen(x: Tensor) -> Tensor:
    """Float32 where the dtype is narrower, else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), elementwise. Twin of `reference.layers.sigmoid`."""
    return torch.sigmoid(x)


def linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """The linear map W x + b over the last axis. Twin of `reference.layers.linear`.

    Args:
        x: [..., i] any float dtype.
        weight: [o, i] of the same dtype; or what computes the map when it is called, its bias included,
            such as a module.
        bias: [o] or None; that of a tensor.

    Returns:
        [..., o].
    """
    if not isinstance(weight, Tensor):
        if not _is_bare(weight):
            return weight(x)
        own: dict[str, Any] = weight._parameters
        return linear(x, own["weight"], own["bias"])
    if weight.numel() >= LARGE and x.dtype == torch.float32 and x.device.type == "cpu":
        rows = x.numel() // x.shape[-1]
        if 0 < rows <= FEW and not torch.compiler.is_compiling():
            return _multiply_few(x, weight, bias)
    return F.linear(x, weight, bias)


FEW, LARGE = 4, 2**16
"""Rows, at most, and numbers of a weight, at least, for which `_multiply_few` is worth its while."""


def _multiply_few(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of a few rows, as W x^T.

    A token that is decoded is a product of one row, or of two with a compression token, whose time is
    that of reading W. As the left factor W is read twice to three times as fast by MKL as in
    `F.linear`, which calls another kernel for one row; so one row is taken twice.
    """
    rows = x.reshape(-1, x.shape[-1])
    columns = (torch.cat([rows, rows]) if len(rows) == 1 else rows).T
    product = (weight @ columns)[:, : len(rows)].T.reshape(*x.shape[:-1], -1)
    return product if bias is None else product + bias


def _is_bare(module: Any) -> bool:
    """Whether to call a module is to multiply by its weight and no more: without hooks, or anything
    in its place. The call alone takes as long as a small product, so it is left out then.
    """
    return type(module) is nn.Linear and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or _has_any_global_hook()
    )


def look_up(ids: Tensor, table: Tensor | nn.Module) -> Tensor:
    """Rows of an embedding table.

    Args:
        ids: [...] int64.
        table: [vocab, d], or a module that looks up in it.

    Returns:
        [..., d].
    """
    return table(ids) if isinstance(table, nn.Module) else F.embedding(ids, table)


def tensor_of(weight: Tensor | nn.Module) -> Tensor:
    """The tensor that a module around a weight holds, where it is not to be called."""
    return cast(Tensor, weight.weight) if isinstance(weight, nn.Module) else weight


def rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """RMSNorm: x / sqrt(mean(x^2) + eps) * weight over the last axis. Twin of
    `reference.layers.rms_norm`.

    Args:
        x: [..., d] any float dtype; the statistic is computed in float32 or wider.
        weight: [d], or of any shape that multiplies x.
        eps: added to the mean square; None is the computing dtype's machine epsilon.

    Returns:
        [..., d] in x's dtype.
    """
    wide = widen(x)
    if eps is None:
        eps = torch.finfo(wide.dtype).eps
    if wide is x and weight.dim() == 1:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return F.rms_norm(wide, x.shape[-1:], None, eps).to(x.dtype) * weight


def adapter(x: Tensor, weights: Weights) -> Tensor:
    """The low-rank residual adapter: x + A_up (A_down x). Twin of `reference.layers.adapter`.

    Args:
        x: [..., d].
        weights: "adapter_down" [rank, d] and "adapter_up" [d, rank].

    Returns:
        [..., d].
    """
    return x + linear(linear(x, weights["adapter_down"]), weights["adapter_up"])


def rotary_frequencies(config: BackboneConfig) -> Tensor:
    """Angle per position of every rotary pair. Twin of `reference.layers.rotary_frequencies`.

    Returns:
        [e / 2] float64, radians per position, on the CPU.

    Source: RoFormer (arXiv 2104.09864); "linear" and "llama3" scaling as Hugging Face names them.
    """
    e = config.head_dim
    exponent = torch.arange(0, e, 2, dtype=torch.float64, device="cpu") / e
    frequencies = config.rope_theta**-exponent
    scaling = config.rope_scaling or {"rope_type": "default"}
    if scaling["rope_type"] == "linear":
        frequencies = frequencies / scaling["factor"]
    elif scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = torch.clamp((turns - low) / (high - low), 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / scaling["factor"])
    return frequencies


def rotary_table(positions: Tensor, config: BackboneConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles. Twin of `reference.layers.rotary_table`.

    Args:
        positions: [r, n] integer, on the CPU, so that no device needs float64.

    Returns:
        (cos, sin), each [r, n, e / 2] float64 on the CPU.
    """
    angles = positions[..., None].to(torch.float64) * rotary_frequencies(config)
    return torch.cos(angles), torch.sin(angles)


def rotary_tables(positions: Tensor, config: BackboneConfig) -> tuple[tuple[Tensor, Tensor], ...]:
    """The tables that a model's layers take: layer i takes `tables[i in config.unrotated_layers]`.
    Twin of `reference.layers.rotary_tables`.

    Args:
        positions: as in `rotary_table`.

    Returns:
        The table of positions; where some layers do not rotate, theirs after it.
    """
    standing = [positions, 0 * positions] if config.unrotated_layers else [positions]
    return tuple(rotary_table(p, config) for p in standing)


def for_heads(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A table of pairs as whole heads take it: both numbers of a pair have their cosine, and of the
    sine the first one has the negative.

    Args:
        table: (cos, sin), each [..., e / 2].

    Returns:
        Two tensors [..., e].
    """
    cos, sin = table
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def of_pairs(table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The other way round than `for_heads`."""
    cos, sin = table
    half = cos.shape[-1] // 2
    return cos[..., :half], sin[..., half:]


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions, half-rotation form. Twin of `reference.layers.rotate`.

    Args:
        x: [b, heads, n, e].
        rotation: a table `for_heads`, [r, n, e] twice, float32 or wider.

    Returns:
        [b, heads, n, e] in x's dtype: pairs (x_j, x_{j + e/2}) turned by their slot's angles.
    """
    cos, sin = (part[:, None] for part in rotation)
    wide = widen(x)
    swapped = wide.roll(x.shape[-1] // 2, dims=-1)  # each number's other one of its pair
    return torch.addcmul(wide * cos, swapped, sin).to(x.dtype)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[b, n, heads * e] -> [b, heads, n, e]. Twin of `reference.layers.split_heads`."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[b, heads, n, e] -> [b, n, heads * e]. Twin of `reference.layers.merge_heads`."""
    return x.transpose(1, 2).flatten(2)


def take_slots(x: Tensor, index: Tensor) -> Tensor:
    """Some slots of every sequence, [b, n, ...] -> [b, a, ...].

    Args:
        x: [b, n] or [b, n, ...].
        index: [r, a] int64.

    Returns:
        [b, a, ...], in the order of the index.
    """
    if index.shape[0] == 1:
        return x.index_select(1, index[0])
    return x.gather(1, _spread(index, x))


def put_slots(x: Tensor, index: Tensor, new: Tensor) -> None:
    """Write slots of every sequence, the other way round than `take_slots`.

    Args:
        x: [b, n, ...], written to.
        index: [r, a] int64; of slots named twice, any of the values stays.
        new: [b, a, ...].
    """
    if index.shape[0] == 1:
        x.index_copy_(1, index[0], new)
    else:
        x.scatter_(1, _spread(index, new), new)


def _spread(index: Tensor, x: Tensor) -> Tensor:
    """[b, a] for each number of a slot, [b, a, ...]."""
    return index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])


def append_slots(past: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """Keys or values of a row with those of its new slots: index = position in the row.

    Args:
        past: [b, k, p, e], the row so far.
        new: [b, k, n, e].
        positions: [r, n]; where r is 1 they continue at p, else each row continues at its own
            length.

    Returns:
        [b, k, p + n, e]: after a row's own length, any finite value. `past` is not written to.
    """
    new = new.to(past.dtype)  # under autocast a product is narrower than the row
    if positions.shape[0] == 1:
        return torch.cat([past, new], dim=2)
    index = positions[:, None, :, None].expand_as(new)
    return F.pad(past, (0, 0, 0, new.shape[2])).scatter(2, index, new)


def causal_mask(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores of a row, so that a slot sees every slot up to itself.

    One mask serves all layers of a round: made once, in the form that attention adds.

    Args:
        positions: [r, n], positions of the new slots.
        length: slots of the row, the new ones included.
        dtype: of the queries.

    Returns:
        [r, 1, n, length], 0 or -inf; None where the new slots are the whole row, alike in all
        sequences.
    """
    if positions.shape == (1, length):
        return None
    unseen = torch.arange(length, device=positions.device) > positions[:, None, :, None]
    return unseen.new_zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    mask: Tensor | None = None,
    past: int | None = None,
) -> Tensor:
    """softmax(<Q, K> / sqrt(e)) V, a slot seeing every slot up to itself. Twin of
    `reference.layers.attention`.

    Args:
        queries: [b, h, n, e] of the new slots, rotated.
        keys, values: [b, k, l, e] of the whole row; h is a multiple of k.
        positions: [r, n], positions of the new slots; a key's index is its position.
        mask: their `causal_mask`, where the caller has it.
        past: slots before the new ones, where these follow one another to the row's end; None asks
            for a mask.

    Returns:
        [b, h, n, e].
    """
    if past is not None:
        return attend_after(queries, keys, values, past)
    if mask is None:
        mask = causal_mask(positions, keys.shape[2], queries.dtype)
    grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
    )


def swiglu(x: Tensor, weights: Weights) -> Tensor:
    """M_down (silu(M_gate x) * M_up x). Twin of `reference.layers.swiglu`.

    Args:
        x: [..., d].
        weights: "gate_proj" and "up_proj" [f, d], "down_proj" [d, f].

    Returns:
        [..., d].
    """
    product = F.silu(linear(x, weights["gate_proj"])) * linear(x, weights["up_proj"])
    return linear(product, weights["down_proj"])


def project_keys_values(
    normed: Tensor, rotation: tuple[Tensor, Tensor], weights: Weights, config: BackboneConfig
) -> tuple[Tensor, Tensor]:
    """Keys (rotated) and values of slots. Twin of `reference.layers.project_keys_values`.

    Args:
        normed: [b, n, d], after the layer's input norm.
        rotation: the table of the slots' positions, `for_heads`.
        weights: "k_proj", "v_proj", and as configured "k_bias", "v_bias", "k_norm".

    Returns:
        keys, values, each [b, k, n, e].
    """
    keys, values = (_biased(normed, name, weights, config) for name in ("k", "v"))
    keys = _turned_heads(keys, config.num_key_value_heads, "k_norm", rotation, weights, config)
    return keys, split_heads(values, config.num_key_value_heads)


def project_queries(
    normed: Tensor, rotation: tuple[Tensor, Tensor], weights: Weights, config: BackboneConfig
) -> Tensor:
    """Queries (rotated) of slots: rotate(norm_q(W_q u + b_q)).

    Args:
        normed, rotation: as in `project_keys_values`.
        weights: "q_proj", and as configured "q_bias", "q_norm".

    Returns:
        [b, h, n, e].
    """
    queries = _biased(normed, "q", weights, config)
    return _turned_heads(queries, config.num_attention_heads, "q_norm", rotation, weights, config)


def _biased(x: Tensor, name: str, weights: Weights, config: BackboneConfig) -> Tensor:
    """The projection "q", "k" or "v", with its bias where configured."""
    bias = weights[f"{name}_bias"] if config.attention_bias else None
    return linear(x, weights[f"{name}_proj"], bias)


def _turned_heads(
    x: Tensor,
    num_heads: int,
    norm: str,
    rotation: tuple[Tensor, Tensor],
    weights: Weights,
    config: BackboneConfig,
) -> Tensor:
    """[b, n, heads * e] -> [b, heads, n, e], normed where configured, and rotated."""
    heads = split_heads(x, num_heads)
    if config.qk_norm:
        heads = rms_norm(heads, weights[norm], config.rms_norm_eps)
    return rotate(heads, rotation)


def project_memory(
    memory: Tensor, rotation: tuple[Tensor, Tensor], weights: Weights, config: BackboneConfig
) -> tuple[Tensor, Tensor]:
    """Memory slots as keys and values, which is all a row ever needs of them.

    The decoder layer's output at a memory slot is dropped, so its query, attention, output
    projection and MLP are never computed. Exact, because a slot's key and value depend on that
    slot alone. The reference runs the slots through the whole layer instead.

    Args:
        memory: [b, slots, d], global then temporary memory.
        rotation: the table of positions 0 .. slots - 1, `for_heads`.

    Returns:
        keys, values, each [b, k, slots, e].
    """
    normed = rms_norm(memory, weights["input_layernorm"], config.rms_norm_eps)
    return project_keys_values(normed, rotation, weights, config)


def decoder_layer(
    hidden: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    rotation: tuple[Tensor, Tensor],
    weights: Weights,
    config: BackboneConfig,
    queried: Tensor | None = None,
    mask: Tensor | None = None,
    past: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One pre-norm decoder layer over new slots of a row. Twin of
    `reference.layers.decoder_layer`.

    Args:
        hidden: [b, n, d], the new slots.
        keys, values: [b, k, p, e], the row so far at this layer.
        positions: [r, n], see `append_slots`.
        rotation: the table of those positions, `for_heads`.
        weights: one layer's tensors.
        queried: [r, a] int64, the new slots that get a query, and so an output; None is all. The
            others give a key and a value, and nothing more of them is computed.
        mask: `causal_mask` of the new slots, where the caller has it.
        past: see `attention`.

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
        rotation, mask, past = (cos, sin), None, None  # these were of all new slots
    queries = project_queries(normed, rotation, weights, config)
    mixed = merge_heads(attention(queries, keys, values, positions, mask, past))
    hidden = hidden + linear(mixed, weights["o_proj"])
    normed = rms_norm(hidden, weights["post_attention_layernorm"], config.rms_norm_eps)
    return hidden + swiglu(normed, weights), keys, values
