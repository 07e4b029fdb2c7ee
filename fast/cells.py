"""A round's new slots up the layers: tensors in, tensors out.

A **cell** is one layer of one round: the decoder layer over the new slots, then that layer's two
memories. Nothing here asks a tensor for its value, and nothing depends on one, so that a round can
be compiled whole. `params`, `config` and the letters of shapes are as in `stream` and `layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reference.config import CoMeTConfig

from .global_memory import read_global, update_global
from .layers import (
    Weights,
    decoder_layer,
    look_up,
    of_pairs,
    project_memory,
    take_slots,
    tensor_of,
)
from .rows import Row
from .temporary_memory import update_temporary

if TYPE_CHECKING:
    from .recorder import Recorder

__all__ = [
    "Layout",
    "embed",
    "open_row",
    "recompute",
    "run_layer",
    "run_layers",
]

Rotation = tuple[Tensor, Tensor]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Layout:
    """What the layers of a round share. It depends on counts alone."""

    rotations: tuple[Rotation, ...]
    """`rotary_tables` of the new slots, `for_heads`."""

    mask: Tensor | None
    """`causal_mask` of the new slots, where attention needs one."""

    past: int | None = None
    """Slots before them, where all follow one another: then no mask is needed."""

    opening: tuple[Rotation, ...] = ()
    """The tables of the memory slots, where rows start with this round."""


Recompute = Callable[..., Any]
"""Called with a function and its arguments, as `torch.utils.checkpoint.checkpoint` is."""


def recompute(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, of which the backward pass keeps the arguments alone: it calls it again, with
    the same random numbers.
    """
    return checkpoint(function, *args, use_reentrant=False)


def embed(text: Tensor, source: Tensor, params: Weights, config: CoMeTConfig) -> Tensor:
    """Embeddings of a round's slots.

    Args:
        text: [b, w] ids, the text tokens of the round; or [b, w, d], their embeddings.
        source: [r, n], see `Row`.

    Returns:
        [b, n, d].
    """
    is_ids = not text.is_floating_point()
    parts = [look_up(text, params["embed_tokens"]) if is_ids else text]
    if config.memory.has_temporary:
        parts.append(tensor_of(params["compression_embedding"]).expand(len(text), 1, -1))
    else:  # no slot points at it
        parts.append(parts[0].new_zeros(len(text), 1, parts[0].shape[-1]))
    if config.memory.has_global:
        parts.append(tensor_of(params["readout_embeddings"]).expand(len(text), -1, -1))
    return take_slots(torch.cat(parts, dim=1), source)


def open_row(
    global_state: Tensor | None,
    queue: Tensor | None,
    rotation: Rotation,
    config: CoMeTConfig,
    *,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    """One layer's row as it starts: [G_t | T_t] as keys and values.

    Args:
        global_state, queue: [b, m, d] and [b, q, d]; None where there is no such memory.
        rotation: the table of positions 0 .. slots - 1, those of the longest row that starts. A
            sequence with fewer reads on over the rest.
        weights: the layer's.

    Returns:
        keys, values, each [b, k, slots, e].
    """
    parts = []
    if global_state is not None:
        parts.append(read_global(global_state, weights["global_memory"]))
    if queue is not None:
        parts.append(queue)
    joined = torch.cat(parts, dim=1)[:, : rotation[0].shape[1]]  # [b, slots, d]
    keys, values = project_memory(joined, rotation, weights, config.backbone)
    return keys.to(joined.dtype), values.to(joined.dtype)  # under autocast they are narrower


def run_layer(
    hidden: Tensor,
    row: Row,
    rotation: Rotation,
    mask: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    global_state: Tensor | None,
    queue: Tensor | None,
    config: CoMeTConfig,
    queried: Tensor | None = None,
    opening: Rotation | None = None,
    past: int | None = None,
    *,
    weights: Weights,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """One cell: a round's new slots through one layer, and that layer's memories updated.

    Args:
        hidden: [b, n, d], the new slots.
        row: their layout, on the device.
        rotation: the table of their positions, `layers.for_heads`.
        mask, past: of their `Layout`.
        keys, values: [b, k, p, e], the rows so far; None where they start, with `open_row`.
        global_state, queue: [b, m, d] and [b, q, d]; None where there is no such memory.
        queried: `row.queried` at the top layer, else None.
        opening: the table of the memory slots of rows that start; None where they have none.
        weights: the layer's.

    Returns:
        hidden [b, n or a, d], keys and values [b, k, p + n, e], global state and queue.
    """
    memory = config.memory
    if keys is None or values is None:
        keys, values = _start_row(hidden, global_state, queue, opening, config, weights)
    hidden, keys, values = decoder_layer(
        hidden,
        keys,
        values,
        row.positions,
        rotation,
        weights,
        config.backbone,
        queried=queried,
        mask=mask,
        past=past,
    )
    c, m = row.compression.shape[1], row.readout.shape[1]
    if queue is not None and c:
        if queried is None:
            compression = take_slots(hidden, row.compression)
        else:
            compression = hidden[:, queried.shape[1] - m - c : queried.shape[1] - m]
        counts = None if row.entries.shape[0] == 1 else (row.queue_length, row.entries)
        net = weights["temporary_memory"]
        queue = update_temporary(queue, compression, net, memory, counts)
    if global_state is not None and m:
        if queried is None:
            readout = take_slots(hidden, row.readout)
        else:
            readout = hidden[:, queried.shape[1] - m :]
        net = weights["global_memory"]
        new = update_global(global_state, readout, net, memory, row.has_state)
        if row.closes.shape[0] > 1:  # else all have readout tokens
            new = torch.where(row.closes[..., None] > 0, new, global_state)
        global_state = new
    return hidden, keys, values, global_state, queue


def _start_row(
    hidden: Tensor,
    global_state: Tensor | None,
    queue: Tensor | None,
    rotation: Rotation | None,
    config: CoMeTConfig,
    weights: Weights,
) -> tuple[Tensor, Tensor]:
    """`open_row`, also of rows without memory slots."""
    if rotation is None:
        heads, e = config.backbone.num_key_value_heads, config.backbone.head_dim
        none = hidden.new_zeros(len(hidden), heads, 0, e)
        return none, none
    return open_row(global_state, queue, rotation, config, weights=weights)


def run_layers(
    text: Tensor,
    row: Row,
    layout: Layout,
    keys: Tensors,
    values: Tensors,
    global_state: Tensors,
    queue: Tensors,
    params: Weights,
    config: CoMeTConfig,
    recorder: Recorder | None = None,
    recompute: Recompute | None = None,
    *,
    keeps_rows: bool = True,
) -> tuple[Tensor, Tensors, Tensors, Tensors, Tensors]:
    """A round's new slots up all layers.

    Args:
        text: [b, w] ids, the text tokens of the round; or [b, w, d], their embeddings.
        row: as in `run_layer`.
        layout: of the round.
        keys, values: per layer [b, k, p, e], the rows so far; empty where they start.
        global_state, queue: per layer, as in the state; empty where there is no such memory.
        recorder: what watches every layer, or None.
        recompute: how a cell is called so that its inside is computed again in the backward pass,
            or None.
        keeps_rows: whether a row goes on after the round.

    Returns:
        [b, w, d], see `Reading.hidden`; then keys and values, empty where no row goes on, global
        state and queues after the round.
    """
    hidden = embed(text, row.source, params, config)  # [b, n, d]
    top = len(params["layers"]) - 1
    cells = []
    for i, weights in enumerate(params["layers"]):
        before, unrotated = hidden, i in config.backbone.unrotated_layers
        rotation = layout.rotations[unrotated]
        cell = weights if isinstance(weights, nn.Module) else partial(run_layer, weights=weights)
        cell = cell if recompute is None else partial(recompute, cell)
        hidden, *found = cell(
            before,
            row,
            rotation,
            layout.mask,
            keys[i] if keys else None,
            values[i] if values else None,
            global_state[i] if global_state else None,
            queue[i] if queue else None,
            config,
            row.queried if i == top else None,
            layout.opening[unrotated] if layout.opening else None,
            layout.past,
        )
        if recorder is not None:
            both = global_state[i] if global_state else None, found[2]
            recorder.layer(before, hidden, found[0], both, row, of_pairs(rotation), weights)
        cells.append(found if keeps_rows else [None, None, *found[2:]])
    if row.queried is None:
        hidden = take_slots(hidden, row.text)
    else:  # text comes first there
        hidden = hidden[:, : hidden.shape[1] - row.compression.shape[1] - row.readout.shape[1]]
    all_keys, all_values, states, queues = zip(*cells, strict=True)
    rows = (all_keys, all_values) if keeps_rows else ((), ())
    return hidden, *rows, states if global_state else (), queues if queue else ()
