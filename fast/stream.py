"""The stream in PyTorch: twin of `reference/stream.py`, batched.

A call becomes rounds (`chunking.plan_rounds`). In a round, `run_row` runs the new slots of every
sequence's open row up the layers in one pass: text, compression tokens and, where chunks close,
readout tokens. A state's tensors are never written to. Throughout, `params` are a model's
weights under the names of `reference.parameters.shapes`, and `config` is its `CoMeTConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.config import CoMeTConfig

from .chunking import Layout, Round, lay_out_batch, plan_rounds
from .global_memory import read_global, update_global
from .layers import (
    Weights,
    causal_mask,
    decoder_layer,
    project_memory,
    rotary_table,
    take_slots,
)
from .state import CoMeTState, fingerprint
from .temporary_memory import update_temporary

__all__ = [
    "Reading",
    "close_chunk",
    "columns",
    "embed",
    "join",
    "new_state",
    "open_chunk",
    "read",
    "run_row",
]


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
    layers, d = backbone.num_hidden_layers, backbone.hidden_size

    def zeros(slots: int) -> tuple[Tensor, ...]:
        shape = (batch_size, slots, d)
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers))

    none = np.zeros(batch_size, dtype=np.int64)
    return CoMeTState(
        model=fingerprint(config),
        tokens=none,
        chunks=none,
        open_tokens=none,
        row_length=none,
        queue_length=none,
        global_state=zeros(memory.global_memory_size) if memory.has_global else (),
        temporary_memory=zeros(0) if memory.has_temporary else (),
        keys=(),
        values=(),
    )


def _rotation(positions: Tensor, params: Weights, config: CoMeTConfig) -> tuple[Tensor, Tensor]:
    """Rotary table of host positions, on the weights' device, in float32 or wider."""
    table = params["embed_tokens"]
    dtype = torch.promote_types(table.dtype, torch.float32)
    cos, sin = rotary_table(positions, config.backbone)
    return cos.to(table.device, dtype), sin.to(table.device, dtype)


def _column(flags: np.ndarray, like: Tensor) -> Tensor:
    """[b] host flags as a tensor that broadcasts against `like`."""
    return torch.from_numpy(flags).to(like.device).view(-1, *[1] * (like.dim() - 1))


def _choose(flags: np.ndarray, yes: Tensor, no: Tensor) -> Tensor:
    """Per sequence one or the other; no copy where all are alike."""
    if flags.all():
        return yes
    return torch.where(_column(flags, yes), yes, no) if flags.any() else no


def _grow(x: Tensor, slots: int) -> Tensor:
    """[b, k, p, e] with zeros behind, up to `slots` slots."""
    return F.pad(x, (0, 0, 0, slots - x.shape[2]))


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
    memory, backbone = config.memory, config.backbone
    if opens is None:
        opens = np.ones(state.batch_size, dtype=bool)
    held = np.where(state.chunks > 0, memory.global_memory_size, 0) + state.queue_length
    slots = int(held[opens].max())
    if slots == 0:
        return state
    longest = max(slots, int(state.row_length[~opens].max(initial=0)))
    rotation = _rotation(torch.arange(slots), params, config)
    keys, values = [], []
    for i, weights in enumerate(params["layers"]):
        parts = []
        if memory.has_global:
            parts.append(read_global(state.global_state[i], weights["global_memory"]))
        if memory.has_temporary:
            parts.append(state.temporary_memory[i])
        # A sequence without memories yet, beside ones that have: its row begins over these slots.
        both = torch.cat(parts, dim=1)[:, :slots]  # [b, m + q, d]
        k, v = project_memory(both, rotation, weights, backbone)
        if not opens.all():
            old = (state.keys[i], state.values[i]) if state.keys else (k, v)
            k = _choose(opens, _grow(k, longest), _grow(old[0], longest))
            v = _choose(opens, _grow(v, longest), _grow(old[1], longest))
        keys.append(k)
        values.append(v)
    return dataclasses.replace(
        state,
        row_length=np.where(opens, held, state.row_length),
        keys=tuple(keys),
        values=tuple(values),
    )


def embed(text: Tensor, layout: Layout, params: Weights, config: CoMeTConfig) -> Tensor:
    """Embeddings of a round's slots.

    Args:
        text: [b, take] ids, the text tokens of the round.
        layout: what each row adds, as indices into text, compression and readout tokens.

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
    return take_slots(torch.cat(parts, dim=1), layout.source)


def run_row(
    text: Tensor,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    plan: Round,
    outputs: str = "all",
) -> tuple[Tensor, CoMeTState]:
    """One round: new slots of every open row up the layers, the memories updated on the way.

    Twin of `reference.stream.run_row`, `read_compression` and what follows the readout tokens in
    `close_chunk`, joined, so that a layer's output lives no longer than the layer.

    Args:
        text: [b, widest] ids, each sequence's `plan.take` first.
        state: where the streams stand; rows with new slots have been opened.
        plan: what each sequence reads, and whether its chunk closes.
        outputs: text tokens whose output is asked for: "all", each sequence's "last", or "none".
            The top layer computes no others.

    Returns:
        [b, w, d], the top layer's output at those text tokens (where a sequence has none, any
        value), w being widest for "all", 1 for "last", 0 for "none"; the state behind the round.
    """
    memory, backbone = config.memory, config.backbone
    facts = np.stack([state.row_length, state.open_tokens, state.queue_length, plan.take])
    later = state.chunks > 0
    alike = bool(
        (facts == facts[:, :1]).all()
        and (plan.close == plan.close[0]).all()
        and (later == later[0]).all()
    )
    rows = slice(0, 1) if alike else slice(None)
    layout = lay_out_batch(state.open_tokens[rows], plan.take[rows], plan.close[rows], memory)
    hidden = embed(text, layout, params, config)  # [b, n, d]
    b, n, _ = hidden.shape
    empty = hidden.new_zeros(b, backbone.num_key_value_heads, 0, backbone.head_dim)
    longest = int(state.row_length.max())

    # [n] or [b, n]. Padding goes behind a row's own slots: no slot before it sees it, and the next
    # round writes over it.
    at = np.arange(n) + (state.row_length[0] if alike else state.row_length[:, None])
    rotation = _rotation(torch.from_numpy(at), params, config)
    positions = torch.from_numpy(at).to(hidden.device)
    new_entries = np.broadcast_to(layout.compression_count, (b,))
    counts = None
    if not alike:
        counts = (
            torch.from_numpy(state.queue_length).to(hidden.device),
            torch.from_numpy(new_entries.copy()).to(hidden.device),
        )

    mask = causal_mask(positions, longest + n, hidden.dtype)
    states, queues, all_keys, all_values = [], [], [], []
    asked = None
    for i, weights in enumerate(params["layers"]):
        if outputs != "all" and i == backbone.num_hidden_layers - 1:
            asked, layout = layout.trim(plan.take[rows], outputs, bool(plan.close.any()))
        keys, values = (state.keys[i], state.values[i]) if state.keys else (empty, empty)
        keys, values = keys[:, :, :longest], values[:, :, :longest]
        hidden, keys, values = decoder_layer(
            hidden, keys, values, positions, rotation, weights, backbone, asked, mask
        )
        all_keys.append(keys)
        all_values.append(values)
        if memory.has_temporary:
            queue = state.temporary_memory[i]
            if layout.compression.size:
                compression = take_slots(hidden, layout.compression)
                queue = queue[:, : int(state.queue_length[0])] if alike else queue
                queue = update_temporary(
                    queue, compression, weights["temporary_memory"], memory, counts
                )
            queues.append(queue)
        if memory.has_global:
            old = state.global_state[i]
            if plan.close.any():
                readout = take_slots(hidden, layout.readout)
                net = weights["global_memory"]
                new = old
                if later.any():
                    new = update_global(old, readout, net, memory)
                if not later.all():
                    new = _choose(later, new, update_global(None, readout, net, memory))
                old = _choose(plan.close, new, old)
            states.append(old)

    row_length = np.where(plan.close, 0, state.row_length + layout.count)
    longest = int(row_length.max())
    queue_length = state.queue_length
    if memory.has_temporary:
        queue_length = np.minimum(queue_length + new_entries, memory.temporary_memory_size)
    return take_slots(hidden, layout.text), dataclasses.replace(
        state,
        tokens=state.tokens + plan.take,
        chunks=state.chunks + plan.close,
        open_tokens=np.where(plan.close, 0, state.open_tokens + plan.take),
        row_length=row_length,
        queue_length=queue_length,
        global_state=tuple(states),
        temporary_memory=tuple(queues),
        keys=tuple(k[:, :, :longest] for k in all_keys) if longest else (),
        values=tuple(v[:, :, :longest] for v in all_values) if longest else (),
    )


def _alike(start: np.ndarray, take: np.ndarray) -> bool:
    return bool((start == start[0]).all() and (take == take[0]).all())


def columns(x: Tensor, start: np.ndarray, take: np.ndarray, fill: int) -> Tensor:
    """The columns that a round reads.

    Args:
        x: [b, n] of the call.
        start: [b] first column of each sequence.
        take: [b] how many.
        fill: what stands in the padding.

    Returns:
        [b, widest].
    """
    if _alike(start, take):
        return x[:, int(start[0]) : int(start[0] + take[0])]
    offset = np.arange(int(take.max()))
    padding = torch.from_numpy(offset >= take[:, None]).to(x.device)
    index = np.minimum(start[:, None] + offset, x.shape[1] - 1)
    return take_slots(x, index).masked_fill(padding, fill)


@dataclass(frozen=True)
class Reading:
    """One round of `read`."""

    hidden: Tensor
    """[b, widest, d], the top layer's output at the text tokens; [b, 1, d] where only the last
    one of each sequence was asked for, [b, 0, d] where none was."""

    start: np.ndarray
    """[b] where in the call each sequence's tokens of this round start."""

    take: np.ndarray
    """[b] how many they are; behind them `hidden` is padding."""

    state: CoMeTState
    """Where the streams stand behind the round."""

    @property
    def alike(self) -> bool:
        """Whether the round reads the same columns of every sequence."""
        return _alike(self.start, self.take)

    def last(self, before: Tensor | None) -> Tensor | None:
        """[b, d], each sequence's last output: this round's, or what it was before."""
        width = self.hidden.shape[1]
        if not width:
            return before
        column = np.clip(self.take - 1, 0, width - 1)[: 1 if self.alike else None, None]
        newest = take_slots(self.hidden, column)[:, 0]
        return newest if before is None else _choose(self.take > 0, newest, before)


def join(parts: Sequence[Reading], n: int) -> Tensor:
    """The outputs of a call's rounds, [b, n, d] in the order of the text, zero in the padding."""
    both = torch.cat([part.hidden for part in parts], dim=1)
    if all(part.alike for part in parts):
        return F.pad(both, (0, 0, 0, n - both.shape[1]))
    b, device = len(both), both.device
    column, real, offset = np.zeros((b, n), dtype=np.int64), np.zeros((b, n), dtype=bool), 0
    for part in parts:
        for row, (start, take) in enumerate(zip(part.start, part.take, strict=True)):
            column[row, start : start + take] = offset + np.arange(take)
            real[row, start : start + take] = True
        offset += part.hidden.shape[1]
    return take_slots(both, column) * torch.from_numpy(real).to(device)[..., None]


def read(
    ids: Tensor,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    chunk_sizes: Sequence[int] | None = None,
    roll: bool = True,
    backprop_chunks: int | None = None,
    lengths: np.ndarray | None = None,
    outputs: str = "all",
) -> Iterator[Reading]:
    """Read text, in any pieces. Twin of `reference.stream.read`, a round at a time.

    Args:
        ids: [b, n] token ids; what is behind a sequence's length is not looked at.
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
    start = np.zeros(len(ids), dtype=np.int64)
    for plan in plan_rounds(lengths, state.open_tokens, size, chunk_sizes):
        opens = (state.row_length == 0) & ((plan.take > 0) | plan.close)
        if opens.any():
            state = open_chunk(state, params, config, opens)
        ends = (plan.take > 0) & (start + plan.take == lengths)
        asked = "none" if outputs == "last" and not ends.any() else outputs
        text = columns(ids, start, plan.take, 0)
        hidden, state = run_row(text, state, params, config, plan, asked)
        if backprop_chunks is not None:
            cut = plan.close & (state.chunks % backprop_chunks == 0)
            state = _detach_rows(state, cut)
        yield Reading(hidden, start, plan.take, state)
        start = start + plan.take


def _detach_rows(state: CoMeTState, rows: np.ndarray) -> CoMeTState:
    """The state through which no gradient flows back for some sequences."""
    return state.map_tensors(lambda t: _choose(rows, t.detach(), t)) if rows.any() else state


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
    text = torch.zeros((state.batch_size, 0), dtype=torch.int64, device=params["norm"].device)
    return run_row(text, state, params, config, Round(nothing, closes), "none")[1]
