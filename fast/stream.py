"""The stream in PyTorch: twin of `reference/stream.py`, batched.

A call becomes rounds (`chunking.plan_rounds`). In a round, `run_row` lays out the new slots of every
sequence's open row (`rows.lay_out`) and runs them up the layers in one pass: text, compression
tokens and, where chunks close, readout tokens. A state's tensors are never written to. Throughout,
`params` are a model's weights under the names of `reference.parameters.shapes`, and `config` is its
`CoMeTConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.config import CoMeTConfig

from .chunking import Round, plan_rounds
from .global_memory import read_global, update_global
from .layers import (
    Weights,
    causal_mask,
    decoder_layer,
    project_memory,
    put_slots,
    rotary_table,
    take_slots,
)
from .rows import Row, count_round, lay_out
from .state import CoMeTState, fingerprint
from .temporary_memory import update_temporary

__all__ = [
    "Reading",
    "close_chunk",
    "embed",
    "join",
    "new_state",
    "open_chunk",
    "read",
    "run_layer",
    "run_layers",
    "run_row",
]

Rotation = tuple[Tensor, Tensor]
Tensors = tuple[Tensor, ...]


def new_state(
    config: CoMeTConfig,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
) -> CoMeTState:
    """The state before any text. Twin of `reference.stream.new_state`.

    Args:
        config: the model.
        dtype: of the tensors to come, the weights' own.
        batch_size: sequences read side by side.
        device: of the tensors.

    Returns:
        The state of `batch_size` streams that have read nothing.
    """
    memory, backbone = config.memory, config.backbone
    d, heads, e = backbone.hidden_size, backbone.num_key_value_heads, backbone.head_dim

    def zeros(*shape: int) -> Tensors:
        return tuple(
            torch.zeros(batch_size, *shape, dtype=dtype, device=device)
            for _ in range(backbone.num_hidden_layers)
        )

    none = np.zeros(batch_size, dtype=np.int64)
    return CoMeTState(
        model=fingerprint(config),
        tokens=none,
        chunks=none,
        open_tokens=none,
        row_length=none,
        queue_length=none,
        global_state=zeros(memory.global_memory_size, d) if memory.has_global else (),
        temporary_memory=zeros(0, d) if memory.has_temporary else (),
        keys=zeros(heads, 0, e),
        values=zeros(heads, 0, e),
    )


def _rotation(positions: np.ndarray, params: Weights, config: CoMeTConfig) -> Rotation:
    """Rotary table of positions [r, n], on the weights' device, in float32 or wider."""
    table = params["embed_tokens"]
    dtype = torch.promote_types(table.dtype, torch.float32)
    cos, sin = rotary_table(torch.from_numpy(positions), config.backbone)
    return cos.to(table.device, dtype), sin.to(table.device, dtype)


def _where_rows(flags: np.ndarray, yes: Tensor, no: Tensor) -> Tensor:
    """Per sequence one or the other; nothing is computed where all are alike.

    Args:
        flags: [b] bool.
        yes, no: [b, ...] of one shape.
    """
    if flags.all() or not flags.any():
        return yes if flags.all() else no
    on_device = torch.from_numpy(flags).to(yes.device)
    return torch.where(on_device.view(-1, *[1] * (yes.dim() - 1)), yes, no)


def _fit(x: Tensor, slots: int) -> Tensor:
    """[b, k, p, e] with so many slots: a copy, so that a longer one can be freed."""
    if slots < x.shape[2]:
        return x[:, :, :slots].clone()
    return F.pad(x, (0, 0, 0, slots - x.shape[2])) if slots > x.shape[2] else x


def open_chunk(
    state: CoMeTState, params: Weights, config: CoMeTConfig, opens: np.ndarray | None = None
) -> CoMeTState:
    """Start rows with [G_t | T_t] as keys and values. Twin of `reference.stream.open_chunk`.

    Args:
        state: where the streams stand.
        opens: [b] bool, whose rows start; None is all. The other rows stay as they are.

    Returns:
        The state with the rows begun, `row_length` their memory slots.
    """
    if opens is None:
        opens = np.ones(state.batch_size, dtype=bool)
    has_state = state.chunks > 0
    memory_slots = has_state * config.memory.global_memory_size + state.queue_length  # [b]
    slots = int(memory_slots[opens].max())
    if slots == 0:
        return state
    row_length = np.where(opens, memory_slots, state.row_length)
    longest = int(row_length.max())
    rotation = _rotation(np.arange(slots)[None], params, config)
    keys, values = [], []
    for i, weights in enumerate(params["layers"]):
        parts = []
        if config.memory.has_global:
            parts.append(read_global(state.global_state[i], weights["global_memory"]))
        if config.memory.has_temporary:
            parts.append(state.temporary_memory[i])
        # A sequence without memories yet, beside ones that have: its row begins over these slots.
        joined = torch.cat(parts, dim=1)[:, :slots]  # [b, m + q, d]
        k, v = project_memory(joined, rotation, weights, config.backbone)
        keys.append(_where_rows(opens, _fit(k, longest), _fit(state.keys[i], longest)))
        values.append(_where_rows(opens, _fit(v, longest), _fit(state.values[i], longest)))
    return dataclasses.replace(state, row_length=row_length, keys=tuple(keys), values=tuple(values))


def embed(text: Tensor, source: Tensor, params: Weights, config: CoMeTConfig) -> Tensor:
    """Embeddings of a round's slots.

    Args:
        text: [b, w] ids, the text tokens of the round.
        source: [r, n], see `Row`.

    Returns:
        [b, n, d].
    """
    table = params["embed_tokens"]
    parts = [F.embedding(text, table)]
    if config.memory.has_temporary:
        parts.append(params["compression_embedding"].expand(len(text), 1, -1))
    else:  # no slot points at it
        parts.append(table.new_zeros(len(text), 1, table.shape[1]))
    if config.memory.has_global:
        parts.append(params["readout_embeddings"].expand(len(text), -1, -1))
    return take_slots(torch.cat(parts, dim=1), source)


def run_layer(
    hidden: Tensor,
    row: Row,
    rotation: Rotation,
    mask: Tensor | None,
    keys: Tensor,
    values: Tensor,
    global_state: Tensor | None,
    queue: Tensor | None,
    weights: Weights,
    config: CoMeTConfig,
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """One cell: a round's new slots through one layer, and that layer's memories updated.

    Args:
        hidden: [b, n, d], the new slots.
        row: their layout, on the device.
        rotation: (cos, sin) of their positions.
        mask: their `causal_mask`.
        keys, values: [b, k, p, e], the rows so far.
        global_state, queue: [b, m, d] and [b, q, d]; None where there is no such memory.
        weights: the layer's.
        outputs: `row.outputs` at the top layer, else None.

    Returns:
        hidden [b, n or a, d], keys and values [b, k, p + n, e], global state and queue.
    """
    memory = config.memory
    hidden, keys, values = decoder_layer(
        hidden,
        keys,
        values,
        row.positions,
        rotation,
        weights,
        config.backbone,
        outputs=outputs,
        mask=mask,
    )
    c, m = row.compression.shape[1], row.readout.shape[1]
    if queue is not None and c:
        if outputs is None:
            compression = take_slots(hidden, row.compression)
        else:
            compression = hidden[:, outputs.shape[1] - m - c : outputs.shape[1] - m]
        counts = None if row.entries.shape[0] == 1 else (row.queue_length, row.entries)
        net = weights["temporary_memory"]
        queue = update_temporary(queue, compression, net, memory, counts)
    if global_state is not None and m:
        if outputs is None:
            readout = take_slots(hidden, row.readout)
        else:
            readout = hidden[:, outputs.shape[1] - m :]
        net = weights["global_memory"]
        new = update_global(global_state, readout, net, memory, row.has_state)
        global_state = torch.where(row.closes[..., None] > 0, new, global_state)
    return hidden, keys, values, global_state, queue


def run_layers(
    text: Tensor,
    row: Row,
    rotation: Rotation,
    keys: Tensors,
    values: Tensors,
    global_state: Tensors,
    queue: Tensors,
    params: Weights,
    config: CoMeTConfig,
) -> tuple[Tensor, Tensors, Tensors, Tensors, Tensors]:
    """A round's new slots up the layers: tensors in, tensors out.

    Nothing here asks a tensor for its value, and nothing depends on one: it can be compiled whole.

    Args:
        text: [b, w] ids, the text tokens of the round.
        row, rotation: as in `run_layer`.
        keys, values: per layer [b, k, p, e], the rows so far.
        global_state, queue: per layer, as in the state; empty where there is no such memory.

    Returns:
        [b, w, d], see `Reading.hidden`; then keys, values, global state and queues after the round.
    """
    hidden = embed(text, row.source, params, config)  # [b, n, d]
    mask = causal_mask(row.positions, keys[0].shape[2] + hidden.shape[1], hidden.dtype)
    top = len(keys) - 1
    cells = []
    for i, weights in enumerate(params["layers"]):
        hidden, *cell = run_layer(
            hidden,
            row,
            rotation,
            mask,
            keys[i],
            values[i],
            global_state[i] if global_state else None,
            queue[i] if queue else None,
            weights,
            config,
            row.outputs if i == top else None,
        )
        cells.append(cell)
    if row.outputs is None:
        hidden = take_slots(hidden, row.text)
    else:  # text comes first there
        hidden = hidden[:, : hidden.shape[1] - row.compression.shape[1] - row.readout.shape[1]]
    all_keys, all_values, states, queues = zip(*cells, strict=True)
    return hidden, all_keys, all_values, states if global_state else (), queues if queue else ()


@dataclass(frozen=True)
class Reading:
    """One round, read."""

    hidden: Tensor
    """[b, w, d], the top layer's output at the text tokens; [b, 1, d] where only each sequence's
    last one was asked for, [b, 0, d] where none was. In padding, any value."""

    row: Row
    """How the round was laid out, on the device."""

    state: CoMeTState
    """Where the streams stand after it."""

    def last(self, previous: Tensor | None) -> Tensor | None:
        """[b, d], each sequence's last output: this round's, or the previous one where it read
        nothing.
        """
        if not self.hidden.shape[1]:
            return previous
        newest = take_slots(self.hidden, self.row.last)[:, 0]
        return newest if previous is None else torch.where(self.row.take > 0, newest, previous)


def join(parts: Sequence[Reading], n: int) -> Tensor:
    """The outputs of a call's rounds, [b, n, d] in the order of the text, zero in the padding."""
    b, _, d = parts[0].hidden.shape
    joined = parts[0].hidden.new_zeros(b, n + 1, d)  # padding goes to the last column
    for part in parts:
        put_slots(joined, part.row.columns, part.hidden)
    return joined[:, :n]


def run_row(
    text: Tensor,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    *,
    plan: Round,
    outputs: str = "all",
) -> Reading:
    """One round: new slots of every open row up the layers, the memories updated on the way.

    Twin of `reference.stream.run_row`, of `read_compression`, and of what follows the readout
    tokens in `close_chunk`, joined, so that a layer's output lives no longer than the layer.

    Args:
        text: [b, n + 1] ids of the whole call; the last column is what padding reads.
        state: where the streams stand; rows with new slots have been opened.
        plan: what each sequence reads, and whether its chunk closes.
        outputs: text tokens whose output is asked for: "all", each sequence's "last", or "none".
            The top layer computes no others.

    Returns:
        A `Reading`.
    """
    laid_out = lay_out(state, plan, config.memory, text.shape[1] - 1, outputs)
    device = params["norm"].device
    row = laid_out.map(lambda x, widths: torch.from_numpy(x).to(device).split(widths, dim=1))
    queue = state.temporary_memory
    if laid_out.is_shared:
        queue = tuple(t[:, : int(state.queue_length[0])] for t in queue)
    hidden, keys, values, states, queue = run_layers(
        take_slots(text, row.columns),
        row,
        _rotation(laid_out.positions, params, config),
        state.keys,
        state.values,
        state.global_state,
        queue,
        params,
        config,
    )
    counts: dict[str, Any] = count_round(state, plan, laid_out, config.memory)
    longest = int(counts["row_length"].max())
    return Reading(
        hidden,
        row,
        dataclasses.replace(
            state,
            **counts,
            global_state=states,
            temporary_memory=queue,
            keys=tuple(_fit(k, longest) for k in keys),
            values=tuple(_fit(v, longest) for v in values),
        ),
    )


def read(
    ids: Tensor,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    *,
    chunk_sizes: Sequence[int] | None = None,
    roll: bool = True,
    backprop_chunks: int | None = None,
    lengths: np.ndarray | None = None,
    outputs: str = "all",
) -> Iterator[Reading]:
    """Read text, in any pieces. Twin of `reference.stream.read`, a round at a time.

    Args:
        ids: [b, n] token ids; what comes after a sequence's length is not looked at.
        state: where the streams stand.
        chunk_sizes, roll, backprop_chunks: as in the reference.
        lengths: [b] int64 tokens of each sequence, 0 for one that waits; None is n for all.
        outputs: text tokens whose output is asked for: "all", each sequence's "last", or "none".

    Yields:
        Each round's top outputs and state, so that nothing grows with the text.
    """
    if lengths is None:
        lengths = np.full(len(ids), ids.shape[1])
    size = config.memory.chunk_size if roll else None
    text = F.pad(ids, (0, 1))
    for plan in plan_rounds(lengths, state.open_tokens, size, chunk_sizes):
        opens = (state.row_length == 0) & (plan.take > 0)
        if opens.any():
            state = open_chunk(state, params, config, opens)
        ends = (plan.take > 0) & (plan.start + plan.take == lengths)
        wanted = "none" if outputs == "last" and not ends.any() else outputs
        part = run_row(text, state, params, config, plan=plan, outputs=wanted)
        if backprop_chunks is not None:
            cut = plan.close & (part.state.chunks % backprop_chunks == 0)
            part = dataclasses.replace(part, state=_detach_rows(part.state, cut))
        state = part.state
        yield part


def _detach_rows(state: CoMeTState, rows: np.ndarray) -> CoMeTState:
    """The state through which no gradient flows back for some sequences, [b] bool."""
    return state.map_tensors(lambda t: _where_rows(rows, t.detach(), t))


def close_chunk(state: CoMeTState, params: Weights, config: CoMeTConfig) -> CoMeTState:
    """End every open chunk by hand, so that what comes next starts a chunk of its own. Twin of
    `reference.stream.close_chunk`.

    Returns:
        The state; a sequence without text since its last chunk is as it was.
    """
    closes = state.open_tokens > 0
    if not closes.any():
        return state
    nothing = np.zeros(state.batch_size, dtype=np.int64)
    plan = Round(start=nothing, take=nothing, close=closes)
    text = torch.zeros((state.batch_size, 1), dtype=torch.int64, device=params["norm"].device)
    return run_row(text, state, params, config, plan=plan, outputs="none").state
