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
    "place_slots",
    "read",
    "run_layers",
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


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    """A host array on a device."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)


def _flags(flags: np.ndarray, device: torch.device) -> bool | Tensor:
    """[b] host flags as one where all are alike, so that nothing is computed to be dropped, else
    as a tensor [b, 1, 1].
    """
    if flags.all() or not flags.any():
        return bool(flags.all())
    return _on(device, flags)[:, None, None]


def _choose(flags: bool | Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Per sequence one or the other, see `_flags`."""
    if isinstance(flags, bool):
        return yes if flags else no
    return torch.where(flags.view(-1, *[1] * (yes.dim() - 1)), yes, no)


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
            chosen = _flags(opens, k.device)
            k = _choose(chosen, _grow(k, longest), _grow(old[0], longest))
            v = _choose(chosen, _grow(v, longest), _grow(old[1], longest))
        keys.append(k)
        values.append(v)
    return dataclasses.replace(
        state,
        row_length=np.where(opens, held, state.row_length),
        keys=tuple(keys),
        values=tuple(values),
    )


@dataclass(frozen=True)
class Slots:
    """A round's new slots on the device: all that its layers need beside tensors of the stream.

    Indices are [1, ...] where all sequences are alike, else [b, ...], see `take_slots`.
    """

    source: Tensor
    """[rows, n]: into [text tokens of the round | the compression token | readout tokens]."""

    positions: Tensor
    """[n] or [b, n] in the row."""

    rotation: tuple[Tensor, Tensor]
    """Rotary table of the positions."""

    mask: Tensor | None
    """`causal_mask` of the positions."""

    places: tuple[Tensor, Tensor, Tensor]
    """[rows, ...]: slots of the text tokens, the compression tokens, the readout tokens."""

    asked: Tensor | None
    """[rows, a]: slots whose output the top layer computes; None is all."""

    top_places: tuple[Tensor, Tensor, Tensor]
    """`places` in what the top layer computes."""

    counts: tuple[Tensor, Tensor] | None
    """Entries in each queue and new ones, [b] each, where sequences differ; see
    `update_temporary`."""

    later: bool | Tensor
    """Whose chunk is not its stream's first, see `_flags`."""

    closes: bool | Tensor
    """Whose chunk closes."""


def place_slots(
    state: CoMeTState, params: Weights, config: CoMeTConfig, plan: Round, outputs: str
) -> tuple[Slots, Layout]:
    """Lay a round out and put it on the device.

    Args:
        state: where the streams stand.
        plan: what each sequence reads, and whether its chunk closes.
        outputs: see `run_row`.

    Returns:
        The slots, and the layout on the host.
    """
    facts = np.stack([state.row_length, state.open_tokens, state.queue_length, plan.take])
    later = state.chunks > 0
    alike = bool(
        (facts == facts[:, :1]).all()
        and (plan.close == plan.close[0]).all()
        and (later == later[0]).all()
    )
    rows = slice(0, 1) if alike else slice(None)
    layout = lay_out_batch(
        state.open_tokens[rows], plan.take[rows], plan.close[rows], config.memory
    )
    device, dtype = params["norm"].device, params["norm"].dtype
    n = layout.source.shape[1]
    # [n] or [b, n]. Padding goes behind a row's own slots: no slot before it sees it, and the next
    # round writes over it.
    at = np.arange(n) + (state.row_length[0] if alike else state.row_length[:, None])
    positions = _on(device, at)
    asked, top = None, layout
    if outputs != "all":
        asked, top = layout.trim(plan.take[rows], outputs, bool(plan.close.any()))
    counts = None
    if not alike:
        counts = _on(device, state.queue_length), _on(device, layout.compression_count)
    slots = Slots(
        source=_on(device, layout.source),
        positions=positions,
        rotation=_rotation(torch.from_numpy(at), params, config),
        mask=causal_mask(positions, int(state.row_length.max()) + n, dtype),
        places=_places(device, layout),
        asked=None if asked is None else _on(device, asked),
        top_places=_places(device, top),
        counts=counts,
        later=_flags(later, device),
        closes=_flags(plan.close, device),
    )
    return slots, layout


def _places(device: torch.device, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _on(device, layout.text),
        _on(device, layout.compression),
        _on(device, layout.readout),
    )


def embed(text: Tensor, source: Tensor, params: Weights, config: CoMeTConfig) -> Tensor:
    """Embeddings of a round's slots.

    Args:
        text: [b, take] ids, the text tokens of the round.
        source: [rows, n], see `Slots`.

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


Tensors = tuple[Tensor, ...]


def run_layers(
    text: Tensor,
    slots: Slots,
    keys: Tensors,
    values: Tensors,
    global_state: Tensors,
    queue: Tensors,
    params: Weights,
    config: CoMeTConfig,
) -> tuple[Tensor, Tensors, Tensors, Tensors, Tensors]:
    """A round's new slots up the layers, the memories updated on the way: tensors in, tensors out.

    Nothing here asks a tensor for its value, and nothing depends on one: it can be compiled whole.

    Args:
        text: [b, widest] ids.
        slots: what `place_slots` made of the round.
        keys, values: per layer [b, k, p, e], the rows so far.
        global_state, queue: per layer, as in the state; empty where there is no such memory.

    Returns:
        [b, w, d], see `run_row`; then keys, values, global state and queues behind the round.
    """
    memory, backbone = config.memory, config.backbone
    hidden = embed(text, slots.source, params, config)  # [b, n, d]
    all_keys, all_values, states, queues = [], [], [], []
    asked, places = None, slots.places
    for i, weights in enumerate(params["layers"]):
        if i == backbone.num_hidden_layers - 1:
            asked, places = slots.asked, slots.top_places
        _, compression, readout = places
        hidden, row_keys, row_values = decoder_layer(
            hidden,
            keys[i],
            values[i],
            slots.positions,
            slots.rotation,
            weights,
            backbone,
            asked,
            slots.mask,
        )
        all_keys.append(row_keys)
        all_values.append(row_values)
        if memory.has_temporary:
            entries = queue[i]
            if compression.numel():
                entries = update_temporary(
                    entries,
                    take_slots(hidden, compression),
                    weights["temporary_memory"],
                    memory,
                    slots.counts,
                )
            queues.append(entries)
        if memory.has_global:
            old, net = global_state[i], weights["global_memory"]
            if slots.closes is not False:
                made = take_slots(hidden, readout)
                new = old
                if slots.later is not False:
                    new = update_global(old, made, net, memory)
                if slots.later is not True:
                    new = _choose(slots.later, new, update_global(None, made, net, memory))
                old = _choose(slots.closes, new, old)
            states.append(old)
    text_places = places[0]
    return (
        take_slots(hidden, text_places),
        tuple(all_keys),
        tuple(all_values),
        tuple(states),
        tuple(queues),
    )


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
    b, layers = state.batch_size, backbone.num_hidden_layers
    slots, layout = place_slots(state, params, config, plan, outputs)
    keys, values, queue = state.keys, state.values, state.temporary_memory
    if not keys:
        empty = params["norm"].new_zeros(b, backbone.num_key_value_heads, 0, backbone.head_dim)
        keys = values = (empty,) * layers
    longest = int(state.row_length.max())
    keys, values = (tuple(t[:, :, :longest] for t in part) for part in (keys, values))
    if slots.counts is None:
        queue = tuple(t[:, : int(state.queue_length[0])] for t in queue)
    hidden, keys, values, states, queue = run_layers(
        text, slots, keys, values, state.global_state, queue, params, config
    )
    row_length = np.where(plan.close, 0, state.row_length + layout.count)
    longest = int(row_length.max())
    queue_length = state.queue_length
    if memory.has_temporary:
        new_entries = np.broadcast_to(layout.compression_count, (b,))
        queue_length = np.minimum(queue_length + new_entries, memory.temporary_memory_size)
    return hidden, dataclasses.replace(
        state,
        tokens=state.tokens + plan.take,
        chunks=state.chunks + plan.close,
        open_tokens=np.where(plan.close, 0, state.open_tokens + plan.take),
        row_length=row_length,
        queue_length=queue_length,
        global_state=states,
        temporary_memory=queue,
        keys=tuple(k[:, :, :longest] for k in keys) if longest else (),
        values=tuple(v[:, :, :longest] for v in values) if longest else (),
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
    return take_slots(x, _on(x.device, index)).masked_fill(padding, fill)


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
        newest = take_slots(self.hidden, _on(self.hidden.device, column))[:, 0]
        if before is None:
            return newest
        return _choose(_flags(self.take > 0, newest.device), newest, before)


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
    return take_slots(both, _on(device, column)) * _on(device, real)[..., None]


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
    if not rows.any():
        return state
    return state.map_tensors(lambda t: _choose(_flags(rows, t.device), t.detach(), t))


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
