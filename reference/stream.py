"""The stream: text in, hidden states out, and between them two memories per layer.

Read it in this order: `open_chunk`, `read_compression`, `close_chunk`, `read`. Everything goes
through `run_row`, which runs new slots of the open chunk's row up the layers.

Throughout, `params` is the nested dict of arrays that `parameters.shapes` names, `config` the
model's `CoMeTConfig`, and `state` where the stream stands. Arguments are not checked here:
`fast.CoMeTModel` is the face that does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .config import CoMeTConfig
from .global_memory import read_global, update_global
from .layers import Array, Weights, decoder_layer, rotary_table
from .temporary_memory import update_temporary

__all__ = [
    "StreamState",
    "close_chunk",
    "detach",
    "new_state",
    "open_chunk",
    "read",
    "read_compression",
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
    """Rotated keys of the open chunk's row, [k, p, e] each; empty where no chunk is open."""

    values: tuple[Array, ...]
    """Its values, [k, p, e] each."""

    @property
    def row_length(self) -> int:
        """Slots in the open chunk's row, memory slots included."""
        return self.keys[0].shape[1] if self.keys else 0


def new_state(config: CoMeTConfig, dtype: np.dtype | type = np.float64) -> StreamState:
    """The state before any text.

    Args:
        config: the model.
        dtype: of the arrays to come, the weights' own.

    Returns:
        No tokens, no chunks, an empty queue in every layer, no open chunk.
    """
    layers, d = config.backbone.num_hidden_layers, config.backbone.hidden_size
    queue = np.zeros((0, d), dtype)
    return StreamState(0, 0, 0, (), (queue,) * layers, (), ())


def run_row(
    hidden: Array, state: StreamState, params: Weights, config: CoMeTConfig
) -> tuple[list[Array], StreamState]:
    """H' of every layer for new slots of the open chunk's row, which grows by them.

    Args:
        hidden: [n, d], the slots' embeddings.

    Returns:
        Per layer [n, d], that layer's output; the state with the slots' keys and values.
    """
    start = state.row_length
    backbone = config.backbone
    positions = np.arange(start, start + len(hidden))
    rotation = rotary_table(positions, backbone)
    none = np.zeros((backbone.num_key_value_heads, 0, backbone.head_dim), hidden.dtype)
    outputs, keys, values = [], [], []
    for i, weights in enumerate(params["layers"]):
        k, v = (state.keys[i], state.values[i]) if state.keys else (none, none)
        hidden, k, v = decoder_layer(hidden, k, v, positions, rotation, weights, backbone)
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
    memory, backbone = config.memory, config.backbone
    keys, values = [], []
    for i, weights in enumerate(params["layers"]):
        slots = state.temporary_memory[i]
        if memory.has_global and state.chunks > 0:
            seen = read_global(state.global_state[i], weights["global_memory"])
            slots = np.concatenate([seen, slots])  # [m + q, d]
        if len(slots) == 0:
            return state
        positions = np.arange(len(slots))
        rotation = rotary_table(positions, backbone)
        none = np.zeros((backbone.num_key_value_heads, 0, backbone.head_dim), slots.dtype)
        _, k, v = decoder_layer(slots, none, none, positions, rotation, weights, backbone)
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


def close_chunk(state: StreamState, params: Weights, config: CoMeTConfig) -> StreamState:
    """End the open chunk: its last group's compression token, the readout tokens, the gate.

    Without text since the last chunk there is nothing to close, and the state is returned as it is.

    Returns:
        The state with both memories updated and no row.
    """
    memory = config.memory
    if state.open_tokens == 0:
        return state
    if memory.has_temporary and memory.trailing_compression:
        state = read_compression(state, params, config)
    states = state.global_state
    if memory.has_global:
        outputs, state = run_row(params["readout_embeddings"], state, params, config)
        old = states or (None,) * len(outputs)
        states = tuple(
            update_global(s, output, weights["global_memory"], memory)
            for s, output, weights in zip(old, outputs, params["layers"], strict=True)
        )
    return dataclasses.replace(
        state,
        chunks=state.chunks + 1,
        open_tokens=0,
        global_state=states,
        keys=(),
        values=(),
    )


def read(
    ids: Sequence[int],
    state: StreamState,
    params: Weights,
    config: CoMeTConfig,
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
        [n, d], the top layer's output at the text tokens; the state behind the text.
    """
    text = np.asarray(ids, dtype=np.int64)
    if chunk_sizes is not None:
        sizes = list(chunk_sizes)
    elif roll:
        chunk_size = config.memory.chunk_size
        first = max(0, chunk_size - state.open_tokens)
        sizes = [min(first, len(ids))]
        while sum(sizes) < len(ids):
            sizes.append(min(chunk_size, len(ids) - sum(sizes)))
    else:
        sizes = [len(ids)]
    tops = [np.zeros((0, config.backbone.hidden_size), params["embed_tokens"].dtype)]
    start = 0
    for number, size in enumerate(sizes):
        if number > 0:
            state = close_chunk(state, params, config)
            if backprop_chunks is not None and state.chunks % backprop_chunks == 0:
                state = detach(state)
        top, state = _read_in_chunk(text[start : start + size], state, params, config)
        tops.append(top)
        start += size
    return np.concatenate(tops), state


def _read_in_chunk(
    ids: Array, state: StreamState, params: Weights, config: CoMeTConfig
) -> tuple[Array, StreamState]:
    """Read text into the open chunk, a compression token before each group after the first."""
    stride = config.memory.compression_stride
    tops = [np.zeros((0, config.backbone.hidden_size), params["embed_tokens"].dtype)]
    start = 0
    while start < len(ids):
        if state.open_tokens == 0:
            state = open_chunk(state, params, config)
        size = len(ids) - start
        if stride:
            if state.open_tokens > 0 and state.open_tokens % stride == 0:
                state = read_compression(state, params, config)
            size = min(size, stride - state.open_tokens % stride)
        group = params["embed_tokens"][ids[start : start + size]]  # [size, d]
        outputs, state = run_row(group, state, params, config)
        tops.append(outputs[-1])
        state = dataclasses.replace(
            state, tokens=state.tokens + size, open_tokens=state.open_tokens + size
        )
        start += size
    return np.concatenate(tops), state


def detach(state: StreamState) -> StreamState:
    """The state through which no derivative flows: a complex step travels in imaginary parts.

    Returns:
        The state with every array's imaginary part dropped, dtypes kept.
    """

    def real(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(a.real.astype(a.dtype) for a in arrays)

    return dataclasses.replace(
        state,
        global_state=real(state.global_state),
        temporary_memory=real(state.temporary_memory),
        keys=real(state.keys),
        values=real(state.values),
    )
