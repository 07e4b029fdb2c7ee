"""A round's new slots up the layers, on arrays: twin of `fast/cells.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from array_api_compat import array_namespace

from reference.config import CoMeTConfig

from ..arrays import Array
from ..rows import Row
from .global_memory import update_global
from .layers import Rotation, Weights, decoder_layer, take_slots
from .temporary_memory import update_temporary

if TYPE_CHECKING:
    from ..recorder import Recorder

__all__ = ["embed", "run_layer", "run_layers"]

Arrays = tuple[Array, ...]


def embed(text: Array, source: Array, params: Weights, config: CoMeTConfig) -> Array:
    """Embeddings of a round's slots.

    Args:
        text: [b, w] ids, the text tokens of the round.
        source: [r, n], see `Row`.

    Returns:
        [b, n, d].
    """
    table = params["embed_tokens"]
    xp, (b, w), d = array_namespace(table), text.shape, table.shape[1]
    parts = [xp.reshape(xp.take(table, xp.reshape(text, (b * w,)), axis=0), (b, w, d))]
    if config.memory.has_temporary:
        parts.append(xp.broadcast_to(params["compression_embedding"][None, None, :], (b, 1, d)))
    else:  # no slot points at it
        parts.append(xp.zeros_like(xp.broadcast_to(table[None, :1, :], (b, 1, d))))
    if config.memory.has_global:
        readout = params["readout_embeddings"][None, :, :]
        parts.append(xp.broadcast_to(readout, (b, *readout.shape[1:])))
    return take_slots(xp.concat(parts, axis=1), source)


def run_layer(
    hidden: Array,
    row: Row,
    rotation: Rotation,
    keys: Array,
    values: Array,
    global_state: Array | None,
    queue: Array | None,
    weights: Weights,
    config: CoMeTConfig,
    queried: Array | None = None,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array | None]:
    """One cell: a round's new slots through one layer, and that layer's memories updated.

    Args:
        hidden: [b, n, d], the new slots.
        row: their layout, on the device.
        rotation: (cos, sin) of their positions.
        keys, values: [b, k, p, e], the rows so far.
        global_state, queue: [b, m, d] and [b, q, d]; None where there is no such memory.
        weights: the layer's.
        queried: `row.queried` at the top layer, else None.

    Returns:
        hidden [b, n or a, d], keys and values [b, k, p + n, e], global state, the queue, and the
        global memory that the next chunk sees where the round made it, else None.
    """
    memory, read = config.memory, None
    hidden, keys, values = decoder_layer(
        hidden,
        keys,
        values,
        row.positions,
        rotation,
        weights,
        config.backbone,
        queried=queried,
    )
    c, m = row.compression.shape[1], row.readout.shape[1]
    if queue is not None and c:
        if queried is None:
            compression = take_slots(hidden, row.compression)
        else:
            compression = hidden[:, queried.shape[1] - m - c : queried.shape[1] - m, :]
        counts = None if row.entries.shape[0] == 1 else (row.queue_length, row.entries)
        net = weights["temporary_memory"]
        queue = update_temporary(queue, compression, net, memory, counts)
    if global_state is not None and m:
        if queried is None:
            readout = take_slots(hidden, row.readout)
        else:
            readout = hidden[:, queried.shape[1] - m :, :]
        net = weights["global_memory"]
        global_state, read = update_global(
            global_state, readout, net, memory, row.has_state, row.closes
        )
    return hidden, keys, values, global_state, queue, read


def run_layers(
    text: Array,
    row: Row,
    rotations: tuple[Rotation, ...],
    keys: Arrays,
    values: Arrays,
    global_state: Arrays,
    queue: Arrays,
    params: Weights,
    config: CoMeTConfig,
    recorder: Recorder | None = None,
) -> tuple[Array, Arrays, Arrays, Arrays, Arrays, Arrays]:
    """A round's new slots up all layers.

    Args:
        text: [b, w] ids, the text tokens of the round.
        row: as in `run_layer`.
        rotations: `rotary_tables` of its positions.
        keys, values: per layer [b, k, p, e], the rows so far.
        global_state, queue: per layer, as in the state; empty where there is no such memory.
        recorder: what watches every layer, or None.

    Returns:
        [b, w, d], see `Reading.hidden`; then keys, values, global state and queues after the
        round, and the global memory that it made, see `Reading.memory`.
    """
    hidden = embed(text, row.source, params, config)  # [b, n, d]
    top = len(keys) - 1
    cells = []
    for i, weights in enumerate(params["layers"]):
        before, rotation = hidden, rotations[i in config.backbone.unrotated_layers]
        hidden, *cell = run_layer(
            before,
            row,
            rotation,
            keys[i],
            values[i],
            global_state[i] if global_state else None,
            queue[i] if queue else None,
            weights,
            config,
            row.queried if i == top else None,
        )
        if recorder is not None:
            both = global_state[i] if global_state else None, cell[2]
            recorder.layer(before, hidden, cell[0], both, row, rotation, weights)
        cells.append(cell)
    if row.queried is None:
        hidden = take_slots(hidden, row.text)
    else:  # text comes first there
        end = hidden.shape[1] - row.compression.shape[1] - row.readout.shape[1]
        hidden = hidden[:, :end, :]
    all_keys, all_values, states, queues, memory = zip(*cells, strict=True)
    return (
        hidden,
        all_keys,
        all_values,
        states if global_state else (),
        queues if queue else (),
        memory if memory[0] is not None else (),
    )
