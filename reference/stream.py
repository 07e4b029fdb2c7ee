"""The stream: text in, hidden states out, and between them two memories per layer.

Text is read token by token: `read_token` opens a chunk where none is open, puts a compression token
after every full group, and runs the token up the layers; `close_chunk` ends a chunk that is full.
However a text is split into calls, the same steps follow each other.

Throughout, `params` is the nested dict of arrays that `parameters.shapes` names, `config` the
model's `CoMeTConfig`, and `state` where the stream stands. Arguments are not checked here:
`fast.CoMeTModel` is the face that does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import CoMeTConfig
from .global_memory import read_global, update_global
from .layers import Array, Weights, decoder_layer, rotary_tables
from .temporary_memory import update_temporary

__all__ = [
    "StreamState",
    "close_chunk",
    "detach",
    "new_state",
    "open_chunk",
    "read",
    "read_compression",
    "read_token",
    "run_row",
]


@dataclass(frozen=True)
class StreamState:
    """Where a stream stands: a value, that no function changes.

    Tuples hold one array a layer. An entry joins the queue as soon as its compression token is
    read; the open chunk's row was made of the queue as it was when the chunk opened.
    """

    tokens: int
    """Text tokens read."""

    chunks: int
    """Chunks closed."""

    open_tokens: int
    """Text tokens in the open chunk."""

    global_state: tuple[Array, ...]
    """S, [m, d] each; empty until the first chunk closes, and where m = 0."""

    temporary_memory: tuple[Array, ...]
    """T, [q, d] each, oldest first."""

    keys: tuple[Array, ...]
    """Rotated keys of the open chunk's row, [k, p, e] each; p = 0 where no chunk is open."""

    values: tuple[Array, ...]
    """Its values, [k, p, e] each."""

    @property
    def row_length(self) -> int:
        """Slots in the open chunk's row, memory slots included."""
        return self.keys[0].shape[1]


def new_state(config: CoMeTConfig, dtype: np.dtype | type = np.float64) -> StreamState:
    """The state before any text.

    Args:
        config: the model.
        dtype: of the arrays to come, the weights' own.

    Returns:
        No tokens, no chunks, an empty queue and an empty row in every layer.
    """
    backbone = config.backbone
    queue = np.zeros((0, backbone.hidden_size), dtype)
    row = np.zeros((backbone.num_key_value_heads, 0, backbone.head_dim), dtype)
    queues, rows = (queue,) * backbone.num_hidden_layers, (row,) * backbone.num_hidden_layers
    return StreamState(0, 0, 0, (), queues, rows, rows)


def run_row(
    hidden: Array, state: StreamState, params: Weights, config: CoMeTConfig
) -> tuple[list[Array], StreamState]:
    """H' of every layer for new slots of the open chunk's row, which grows by them.

    Args:
        hidden: [n, d], the slots' embeddings.

    Returns:
        Per layer [n, d], that layer's output; the state with the slots' keys and values.
    """
    backbone, positions = config.backbone, state.row_length + np.arange(len(hidden))
    rotations = rotary_tables(positions, backbone)
    outputs, keys, values = [], [], []
    for i, weights in enumerate(params["layers"]):
        rotation = rotations[i in backbone.unrotated_layers]
        row = state.keys[i], state.values[i]
        hidden, k, v = decoder_layer(hidden, *row, positions, rotation, weights, backbone)
        outputs.append(hidden)
        keys.append(k)
        values.append(v)
    return outputs, dataclasses.replace(state, keys=tuple(keys), values=tuple(values))


def open_chunk(state: StreamState, params: Weights, config: CoMeTConfig) -> StreamState:
    """Start a row with [G_t | T_t], each layer its own; the layer's outputs there are dropped.

    Memory slots do not go up: every layer starts its row with what that layer remembers. The first
    chunk has nothing to start with.

    Returns:
        The state with the row's keys and values, [k, m + q, e] per layer.
    """
    keys, values = [], []
    for i, weights in enumerate(params["layers"]):
        slots = state.temporary_memory[i]
        if state.global_state:
            seen = read_global(state.global_state[i], weights["global_memory"])
            slots = np.concatenate([seen, slots])  # [m + q, d]
        positions = np.arange(len(slots))
        rotations = rotary_tables(positions, config.backbone)
        rotation = rotations[i in config.backbone.unrotated_layers]
        row = state.keys[i], state.values[i]
        _, k, v = decoder_layer(slots, *row, positions, rotation, weights, config.backbone)
        keys.append(k)
        values.append(v)
    return dataclasses.replace(state, keys=tuple(keys), values=tuple(values))


def read_compression(state: StreamState, params: Weights, config: CoMeTConfig) -> StreamState:
    """Read one compression token into the row, and push what each layer makes of it.

    Returns:
        The state: the row longer by one slot, each layer's queue by one entry of at most B.
    """
    slot = params["compression_embedding"][None]  # [1, d]
    outputs, state = run_row(slot, state, params, config)
    queues = tuple(
        update_temporary(queue, output, weights["temporary_memory"], config.memory)
        for queue, output, weights in zip(
            state.temporary_memory, outputs, params["layers"], strict=True
        )
    )
    return dataclasses.replace(state, temporary_memory=queues)


def read_token(
    token: int, state: StreamState, params: Weights, config: CoMeTConfig
) -> tuple[Array, StreamState]:
    """Read one text token into the open chunk, after what has to stand before it.

    That is the memories where no chunk is open, a compression token where the chunk's last group
    has just become full.

    Returns:
        [1, d], the top layer's output; the state after the token.
    """
    stride = config.memory.compression_stride
    if state.open_tokens == 0:
        state = open_chunk(state, params, config)
    elif stride and state.open_tokens % stride == 0:
        state = read_compression(state, params, config)
    outputs, state = run_row(params["embed_tokens"][[token]], state, params, config)
    return outputs[-1], dataclasses.replace(
        state, tokens=state.tokens + 1, open_tokens=state.open_tokens + 1
    )


def close_chunk(state: StreamState, params: Weights, config: CoMeTConfig) -> StreamState:
    """End the open chunk: its last group's compression token, the readout tokens, the gate.

    Without text since the last chunk there is nothing to close, and the state is returned as it is.

    Returns:
        The state with both memories updated and an empty row.
    """
    memory = config.memory
    if state.open_tokens == 0:
        return state
    if memory.has_temporary and memory.trailing_compression:
        state = read_compression(state, params, config)
    states = state.global_state
    if memory.has_global:
        outputs, state = run_row(params["readout_embeddings"], state, params, config)
        states = tuple(
            update_global(s, output, weights["global_memory"], memory)
            for s, output, weights in zip(
                states or [None] * len(outputs), outputs, params["layers"], strict=True
            )
        )
    return dataclasses.replace(
        state,
        chunks=state.chunks + 1,
        open_tokens=0,
        global_state=states,
        keys=tuple(k[:, :0] for k in state.keys),
        values=tuple(v[:, :0] for v in state.values),
    )


def read(
    ids: Sequence[int],
    state: StreamState,
    params: Weights,
    config: CoMeTConfig,
    *,
    chunk_sizes: Sequence[int] | None = None,
    roll: bool = True,
    backprop_chunks: int | None = None,
) -> tuple[Array, StreamState]:
    """Read text, in any pieces: reading "ab" is reading "a" and then "b".

    Args:
        ids: [n] token ids.
        state: where the stream stands.
        chunk_sizes: sizes in tokens, adding up to n, of the chunks to cut this text into, instead
            of the config's chunk size. The first goes on with the open chunk, if there is one;
            the last stays open.
        roll: False never closes a chunk; not looked at where `chunk_sizes` is given.
        backprop_chunks: derivatives are cut at every so many chunk borders of the stream, counted
            from its start; None never cuts.

    Returns:
        [n, d], the top layer's output at the text tokens; the state after the text.
    """
    borders = None if chunk_sizes is None else set(np.cumsum(chunk_sizes).tolist())
    outputs = [np.zeros((0, config.backbone.hidden_size), params["embed_tokens"].dtype)]
    for number, token in enumerate(ids):
        is_full = roll and state.open_tokens >= config.memory.chunk_size
        if is_full if borders is None else number in borders:
            state = close_chunk(state, params, config)
            if backprop_chunks is not None and state.chunks % backprop_chunks == 0:
                state = detach(state)
        output, state = read_token(token, state, params, config)
        outputs.append(output)
    return np.concatenate(outputs), state


def detach(state: StreamState) -> StreamState:
    """The state through which no derivative flows: a complex step travels in imaginary parts.

    Returns:
        The state with every array's imaginary part dropped, dtypes kept.
    """
    arrays: dict[str, Any] = {
        name: tuple(a.real.astype(a.dtype) for a in getattr(state, name))
        for name in ("global_state", "temporary_memory", "keys", "values")
    }
    return dataclasses.replace(state, **arrays)
