"""The stream on arrays: twin of `reference/stream.py` and, round by round, of `fast/stream.py`.

Throughout, `params` are weights under the names of `reference.parameters.shapes`, and `config` is
their `CoMeTConfig`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace, device

from reference.config import CoMeTConfig

from ..arrays import Array
from ..chunking import Round, plan_rounds
from ..rows import Row, count_round, lay_out
from ..state import CoMeTState, fingerprint
from .cells import Arrays, run_layers
from .global_memory import read_global
from .layers import Weights, choose, project_memory, rotary_tables, take_slots

if TYPE_CHECKING:
    from ..recorder import Recorder

__all__ = ["Reading", "close_chunk", "join", "new_state", "open_chunk", "read", "run_row"]


def new_state(config: CoMeTConfig, like: Array, batch_size: int = 1) -> CoMeTState:
    """The state before any text. Twin of `reference.stream.new_state`.

    Args:
        config: the model.
        like: an array of the model: the state has its library, dtype and device.
        batch_size: sequences read side by side.

    Returns:
        The state of `batch_size` streams that have read nothing.
    """
    xp, memory, backbone = array_namespace(like), config.memory, config.backbone
    d, heads, e = backbone.hidden_size, backbone.num_key_value_heads, backbone.head_dim

    def zeros(*shape: int) -> Arrays:
        zero = xp.zeros((batch_size, *shape), dtype=like.dtype, device=device(like))
        return (zero,) * backbone.num_hidden_layers  # none is ever written to

    tokens, chunks, open_tokens, row_length, queue_length = np.zeros((5, batch_size), np.int64)
    return CoMeTState(
        model=fingerprint(config),
        tokens=tokens,
        chunks=chunks,
        open_tokens=open_tokens,
        row_length=row_length,
        queue_length=queue_length,
        global_state=zeros(memory.global_memory_size, d) if memory.has_global else (),
        temporary_memory=zeros(0, d) if memory.has_temporary else (),
        keys=zeros(heads, 0, e),
        values=zeros(heads, 0, e),
    )


def _fit(x: Array, slots: int) -> Array:
    """[b, k, p, e] with so many slots: a copy, so that a longer one can be freed."""
    xp, (b, k, p, e) = array_namespace(x), x.shape
    if slots <= p:
        return x if slots == p else xp.asarray(x[:, :, :slots, :], copy=True)
    more = xp.zeros((b, k, slots - p, e), dtype=x.dtype, device=device(x))
    return xp.concat([x, more], axis=2)


def open_chunk(
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    opens: np.ndarray | None = None,
    memory: Arrays = (),
) -> CoMeTState:
    """Start rows with [G_t | T_t] as keys and values. Twin of `reference.stream.open_chunk`.

    Args:
        state: where the streams stand.
        opens: [b] bool, whose rows start; None is all. The other rows stay as they are.
        memory: per layer G_t, where the round that closed the last chunk made it; else it is
            read from S_t.

    Returns:
        The state with the rows begun, `row_length` their memory slots.
    """
    if opens is None:
        opens = np.ones(state.batch_size, dtype=bool)
    has_state = state.chunks > 0
    memory_slots = has_state * config.memory.global_slots + state.queue_length  # [b]
    slots = int(memory_slots[opens].max())
    if slots == 0:
        return state
    row_length = np.where(opens, memory_slots, state.row_length)
    longest = int(row_length.max())
    xp, where = array_namespace(params["norm"]), device(params["norm"])
    rotations = rotary_tables(np.arange(slots)[None], config.backbone, params["norm"])
    flags = None if opens.all() else xp.asarray(opens[:, None, None, None], device=where)

    def begin(new: Array, old: Array) -> Array:
        new = _fit(new, longest)
        return new if flags is None else choose(flags, new, _fit(old, longest))

    keys, values = [], []
    for i, weights in enumerate(params["layers"]):
        parts = []
        if memory:
            parts.append(memory[i])
        elif config.memory.has_global:
            parts.append(read_global(state.global_state[i], weights["global_memory"]))
        if config.memory.has_temporary:
            parts.append(state.temporary_memory[i])
        # A sequence without memories yet, beside ones that have: its row begins over these slots.
        joined = xp.concat(parts, axis=1)[:, :slots, :]  # [b, m + q, d]
        rotation = rotations[i in config.backbone.unrotated_layers]
        k, v = project_memory(joined, rotation, weights, config.backbone)
        keys.append(begin(k, state.keys[i]))
        values.append(begin(v, state.values[i]))
    return dataclasses.replace(state, row_length=row_length, keys=tuple(keys), values=tuple(values))


@dataclass(frozen=True)
class Reading:
    """One round, read."""

    hidden: Array
    """[b, w, d], the top layer's output at the text tokens; [b, 1, d] where only each sequence's
    last one was asked for, [b, 0, d] where none was. In padding, any value."""

    columns: np.ndarray
    """[r, w]: columns of the call that were read; padding has the one after them."""

    row: Row
    """How the round was laid out, on the device."""

    state: CoMeTState
    """Where the streams stand after it."""

    memory: Arrays
    """Per layer G, the global memory that the next chunk sees; empty where no chunk closed,
    so that it is what it was."""

    def last(self, previous: Array | None) -> Array | None:
        """[b, d], each sequence's last output: this round's, or the previous one where it read
        nothing.
        """
        if not self.hidden.shape[1]:
            return previous
        newest = take_slots(self.hidden, self.row.last)[:, 0, :]
        if previous is None:
            return newest
        return choose(self.row.take > 0, newest, previous)


def join(parts: Sequence[Reading], n: int) -> Array:
    """The outputs of a call's rounds, [b, n, d] in the order of the text, zero in the padding."""
    xp = array_namespace(parts[0].hidden)
    joined = xp.concat([part.hidden for part in parts], axis=1)
    b, start = joined.shape[0], 0
    place, is_text = np.zeros((b, n + 1), dtype=np.int64), np.zeros((b, n + 1), dtype=bool)
    for part in parts:
        width = part.columns.shape[1]
        columns = np.broadcast_to(part.columns, (b, width))
        np.put_along_axis(place, columns, start + np.arange(width)[None], axis=1)
        np.put_along_axis(is_text, columns, True, axis=1)
        start += width
    place, is_text = place[:, :n], is_text[:, :n, None]
    where = device(joined)
    taken = take_slots(joined, xp.asarray(np.where(is_text[..., 0], place, 0), device=where))
    return choose(xp.asarray(is_text, device=where), taken, xp.zeros_like(taken))


def run_row(
    text: Array,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    *,
    plan: Round,
    outputs: str = "all",
    recorder: Recorder | None = None,
) -> Reading:
    """One round: new slots of every open row up the layers, the memories updated on the way. Twin
    of `fast.stream.run_row`.

    Args:
        text: [b, n + 1] ids of the whole call; the last column is what padding reads.
        state: where the streams stand; rows with new slots have been opened.
        plan: what each sequence reads, and whether its chunk closes.
        outputs: text tokens whose output is asked for: "all", each sequence's "last", or "none".
        recorder: what watches, or None.

    Returns:
        A `Reading`.
    """
    laid_out = lay_out(state, plan, config.memory, text.shape[1] - 1, outputs)
    if recorder is not None:
        recorder.begin(state, plan, laid_out, config)
    xp, where = array_namespace(params["norm"]), device(params["norm"])

    def to_device(indices: np.ndarray, widths: list[int]) -> list[Array]:
        whole, ends = xp.asarray(indices, device=where), np.cumsum(widths).tolist()
        return [whole[:, a:b] for a, b in zip([0, *ends], ends, strict=False)]

    row = laid_out.map(to_device)
    queue = state.temporary_memory
    if laid_out.is_shared:
        queue = tuple(t[:, : int(state.queue_length[0]), :] for t in queue)
    hidden, keys, values, states, queue, memory = run_layers(
        take_slots(text, row.columns),
        row,
        rotary_tables(laid_out.positions, config.backbone, params["norm"]),
        state.keys,
        state.values,
        state.global_state,
        queue,
        params,
        config,
        recorder,
    )
    counts: dict[str, Any] = count_round(state, plan, laid_out, config.memory)
    longest = int(counts["row_length"].max())
    return Reading(
        hidden,
        laid_out.columns,
        row,
        dataclasses.replace(
            state,
            **counts,
            global_state=states,
            temporary_memory=queue,
            keys=tuple(_fit(k, longest) for k in keys),
            values=tuple(_fit(v, longest) for v in values),
        ),
        memory,
    )


def read(
    ids: Array,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    *,
    chunk_sizes: Sequence[int] | None = None,
    roll: bool = True,
    lengths: np.ndarray | None = None,
    outputs: str = "all",
    recorder: Recorder | None = None,
) -> Iterator[Reading]:
    """Read text, in any pieces. Twin of `reference.stream.read`, a round at a time.

    Args:
        ids: [b, n] token ids; what comes after a sequence's length is not looked at.
        state: where the streams stand.
        chunk_sizes, roll: as in the reference.
        lengths: [b] int64 tokens of each sequence, 0 for one that waits; None is n for all.
        outputs: text tokens whose output is asked for: "all", each sequence's "last", or "none".
        recorder: what watches, or None.

    Yields:
        Each round's top outputs and state, so that nothing grows with the text.
    """
    xp, (b, n) = array_namespace(ids), ids.shape
    if lengths is None:
        lengths = np.full(b, n)
    size = config.memory.chunk_size if roll else None
    text, memory = xp.concat([ids, xp.zeros_like(ids[:, :1])], axis=1), ()
    for plan in plan_rounds(lengths, state.open_tokens, size, chunk_sizes):
        opens = (state.row_length == 0) & (plan.take > 0)
        if opens.any():
            state = open_chunk(state, params, config, opens, memory)
        ends = (plan.take > 0) & (plan.start + plan.take == lengths)
        wanted = "none" if outputs == "last" and not ends.any() else outputs
        part = run_row(text, state, params, config, plan=plan, outputs=wanted, recorder=recorder)
        state, memory = part.state, part.memory or memory
        yield part


def close_chunk(
    state: CoMeTState, params: Weights, config: CoMeTConfig, recorder: Recorder | None = None
) -> CoMeTState:
    """End every open chunk by hand, so that what comes next starts a chunk of its own. Twin of
    `reference.stream.close_chunk`.

    Returns:
        The state; a sequence without text since its last chunk is as it was.
    """
    closes = state.open_tokens > 0
    if not closes.any():
        return state
    xp = array_namespace(params["norm"])
    nothing = np.zeros(state.batch_size, dtype=np.int64)
    plan = Round(start=nothing, take=nothing, close=closes)
    text = xp.zeros((state.batch_size, 1), dtype=xp.int64, device=device(params["norm"]))
    return run_row(text, state, params, config, plan=plan, outputs="none", recorder=recorder).state
