"""The stream in PyTorch: twin of `reference/stream.py`, batched.

A call becomes rounds (`chunking.plan_rounds`). In a round, `run_row` lays out the new slots of
every sequence's open row (`rows.lay_out`) and runs them up the layers in one pass
(`cells.run_layers`): text, compression tokens and, where chunks close, readout tokens. A state's
tensors are never written to. Throughout, `params` are a model's weights under the names of
`reference.parameters.shapes`, and `config` is its `CoMeTConfig`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference.config import CoMeTConfig, MemoryConfig

from .attention import needs_mask
from .cells import Layout, Recompute, Rotation, Tensors, open_row, run_layers
from .chunking import Round, plan_rounds
from .compiling import replace, untraced
from .diagonal import Stacked, read_diagonals
from .layers import Weights, causal_mask, for_heads, put_slots, rotary_tables, take_slots
from .rereading import Rereader
from .rows import Row, count_memory_slots, count_round, lay_out
from .state import CoMeTState, fingerprint

if TYPE_CHECKING:
    from .recorder import Recorder

__all__ = [
    "Layouts",
    "Reading",
    "close_chunk",
    "count_alike",
    "join",
    "layout_of",
    "new_state",
    "open_chunk",
    "place_row",
    "read",
    "read_alike",
    "rotations_at",
    "run_row",
]

RunLayers = Callable[..., Any]
"""`cells.run_layers`, or what stands in for it."""

LAYOUTS = 4
"""Layouts that are kept while a text is read: while queues fill, each chunk has another."""

ALIKE = 64
"""Chunks that are read along diagonals at a time, at most."""

Layouts = dict[tuple[Any, ...], tuple[Row, Row, Layout]]
"""By what they depend on, if sequences are alike: rows on the host and on the device, and layouts."""


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


@untraced()
def rotations_at(
    positions: np.ndarray, params: Weights, config: CoMeTConfig
) -> tuple[Rotation, ...]:
    """`rotary_tables` of positions [r, n], `for_heads`, on the weights' device, in float32 or wider."""
    like = params["norm"]
    dtype = torch.promote_types(like.dtype, torch.float32)
    tables = rotary_tables(torch.from_numpy(positions), config.backbone)
    return tuple(
        for_heads((cos.to(like.device, dtype), sin.to(like.device, dtype))) for cos, sin in tables
    )


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


@untraced()
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
    memory_slots = count_memory_slots(state, config.memory)  # [b]
    slots = int(memory_slots[opens].max())
    if slots == 0:
        return state
    row_length = np.where(opens, memory_slots, state.row_length)
    longest = int(row_length.max())
    rotations = rotations_at(np.arange(slots)[None], params, config)
    keys, values = [], []
    for i, weights in enumerate(params["layers"]):
        k, v = open_row(
            state.global_state[i] if state.global_state else None,
            state.temporary_memory[i] if state.temporary_memory else None,
            rotations[i in config.backbone.unrotated_layers],
            config,
            weights=weights,
        )
        keys.append(_where_rows(opens, _fit(k, longest), _fit(state.keys[i], longest)))
        values.append(_where_rows(opens, _fit(v, longest), _fit(state.values[i], longest)))
    return replace(state, row_length=row_length, keys=tuple(keys), values=tuple(values))


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

    cut: bool
    """Whether gradients are cut after it: a window of `backprop_chunks` ends."""

    nats: Tensor | None = None
    """Scalar, the sum of its labels' losses, where there are labels."""

    num_labels: Tensor | None = None
    """Scalar int64, how many they are."""

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


@untraced(recursive=False)
def run_row(
    text: Tensor,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    *,
    plan: Round,
    outputs: str = "all",
    recorder: Recorder | None = None,
    recompute: Recompute | None = None,
    layouts: Layouts | None = None,
    layers: RunLayers = run_layers,
) -> Reading:
    """One round: new slots of every open row up the layers, the memories updated on the way.

    Twin of `reference.stream.run_row`, of `read_compression`, and of what follows the readout
    tokens in `close_chunk`, joined, so that a layer's output lives no longer than the layer.

    Args:
        text: [b, n + 1] ids of the whole call, or [b, n + 1, d] embeddings; the last column is what
            padding reads.
        state: where the streams stand. Rows start where new slots come to none.
        plan: what each sequence reads, and whether its chunk closes.
        outputs: text tokens whose output is asked for: "all", each sequence's "last", or "none".
            The top layer computes no others.
        recorder: what watches, or None.
        recompute: see `cells.run_layers`.
        layouts: of rounds that were read before, to take one from, and to put this one's into.
        layers: `cells.run_layers`, or what a compiler made of it, which serves where nobody watches
            and nothing is recomputed.

    Returns:
        A `Reading`.
    """
    opens = (state.row_length == 0) & (plan.take > 0)
    starts = bool(opens.all())
    if starts:
        slots = count_memory_slots(state, config.memory)
        state = replace(state, row_length=slots)
    elif opens.any():
        begin = open_chunk if recompute is None else partial(recompute, open_chunk)
        state = begin(state, params, config, opens)
    laid_out, row, layout = _lay_out(
        state, plan, params, config, outputs, text.shape[1] - 1, starts, layouts
    )
    if recorder is not None:
        recorder.begin(state, plan, laid_out, config)
    queue = state.temporary_memory
    if laid_out.is_shared:
        queue = tuple(t[:, : int(state.queue_length[0])] for t in queue)
    ends = bool(plan.close.all())
    plain = recorder is None and recompute is None
    hidden, keys, values, states, queue = (layers if plain else run_layers)(
        take_slots(text, row.columns),
        row,
        layout,
        () if starts else state.keys,
        () if starts else state.values,
        state.global_state,
        queue,
        params,
        config,
        recorder,
        recompute,
        keeps_rows=not ends,
    )
    after = replace(state, global_state=states, temporary_memory=queue)
    if not ends:
        after = replace(after, keys=keys, values=values)
    return Reading(hidden, row, _count(after, plan, laid_out, config), bool(np.any(plan.cut)))


@untraced()
def _lay_out(
    state: CoMeTState,
    plan: Round,
    params: Weights,
    config: CoMeTConfig,
    outputs: str,
    num_columns: int,
    starts: bool,
    known: Layouts | None,
) -> tuple[Row, Row, Layout]:
    """The round's row, on the host and on the device, and its layout: what is known, or made.

    Chunks of a steady stream have the same but for the columns that they read.
    """
    counts = plan.take, plan.close, state.open_tokens, state.row_length, state.queue_length
    alike = all((x == x[0]).all() for x in (plan.start, *counts, state.chunks > 0))
    key = starts, outputs, *(int(x[0]) for x in counts), bool(state.chunks[0])
    found = known.get(key) if alike and known is not None else None
    if found is None:
        relative = replace(plan, start=0 * plan.start) if alike else plan
        laid_out = lay_out(state, relative, config.memory, num_columns, outputs)
        row, slots = place_row(laid_out, params["norm"].device), int(state.row_length.max())
        layout = layout_of(laid_out, row, slots, params, config, starts=starts)
        found = laid_out, row, layout
        if alike and known is not None:
            known[key] = found
            if len(known) > LAYOUTS:
                known.pop(next(iter(known)))
    laid_out, row, layout = found
    if alike:
        row = replace(row, columns=row.columns + int(plan.start[0]))
    return laid_out, row, layout


def layout_of(
    laid_out: Row, row: Row, slots: int, params: Weights, config: CoMeTConfig, *, starts: bool
) -> Layout:
    """What the layers of a round share.

    Args:
        laid_out, row: the round, on the host and on the device.
        slots: of the longest row before it.
        starts: whether these are memory slots, of rows that start with the round.
    """
    norm, new = params["norm"], row.source.shape[1]
    masked = not laid_out.is_shared or needs_mask(norm.device.type, slots, new)
    return Layout(
        rotations_at(laid_out.positions, params, config),
        causal_mask(row.positions, slots + new, norm.dtype) if masked else None,
        None if masked else slots,
        rotations_at(np.arange(slots)[None], params, config) if starts and slots else (),
    )


def place_row(laid_out: Row, device: torch.device) -> Row:
    """A row that was laid out on the host, on a device."""
    if (laid_out.has_state > 0).all():
        laid_out = replace(laid_out, has_state=None)
    return laid_out.map(lambda x, widths: torch.from_numpy(x).to(device).split(widths, dim=1))


@untraced()
def _count(state: CoMeTState, plan: Round, laid_out: Row, config: CoMeTConfig) -> CoMeTState:
    """The state with the counts after the round, its rows as long as the longest."""
    counts: dict[str, Any] = count_round(state, plan, laid_out, config.memory)
    longest = int(counts["row_length"].max())
    return replace(
        state,
        **counts,
        keys=tuple(_fit(k, longest) for k in state.keys),
        values=tuple(_fit(v, longest) for v in state.values),
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
    cuts_all: bool = False,
    recorder: Recorder | None = None,
    recompute: Recompute | None = None,
    reread: Rereader | None = None,
    finish: Callable[[Reading], Reading] | None = None,
    layers: RunLayers = run_layers,
    stacked: Stacked | None = None,
) -> Iterator[Reading]:
    """Read text, in any pieces. Twin of `reference.stream.read`, a round at a time.

    Args:
        ids: [b, n] token ids, or [b, n, d] embeddings in their place; what comes after a sequence's
            length is not looked at.
        state: where the streams stand.
        chunk_sizes, roll, backprop_chunks: as in the reference.
        lengths: [b] int64 tokens of each sequence, 0 for one that waits; None is n for all.
        outputs: text tokens whose output is asked for: "all", each sequence's "last", or "none".
        cuts_all: whether a cut is of all sequences, those too whose text has ended, so that nothing
            of the graph before it is kept.
        recorder: what watches, or None.
        recompute: how `open_chunk` and every cell are called, so that a backward pass keeps their
            inputs alone and computes the rest again; None keeps all.
        reread: reads each round, so that of it a backward pass keeps the memories before it alone.
        finish: what is made of a round, its score for instance, where it is read.
        layers: see `run_row`.
        stacked: the layers' weights, with which chunks that are alike are read along diagonals; None
            reads one after another.

    Yields:
        Each round's top outputs and state, so that nothing grows with the text.
    """
    if lengths is None:
        lengths = np.full(len(ids), ids.shape[1])
    size = config.memory.chunk_size if roll else None
    text = F.pad(ids, (0, 0) * (ids.dim() - 2) + (0, 1))
    layouts: Layouts = {}
    plans = plan_rounds(
        lengths, state.open_tokens, size, chunk_sizes, state.chunks, backprop_chunks
    )
    waiting: deque[Round] = deque()
    while True:
        waiting.extend(itertools.islice(plans, (1 if stacked is None else ALIKE) - len(waiting)))
        if not waiting:
            return
        alike = 0 if stacked is None else count_alike(state, waiting, config.memory)
        if stacked is not None and alike > 1:
            group = [waiting.popleft() for _ in range(alike)]
            for part in read_alike(text, state, params, config, group, stacked, layouts, outputs):
                state = part.state
                yield part if finish is None else finish(part)
            continue
        plan = waiting.popleft()
        ends = (plan.take > 0) & (plan.start + plan.take == lengths)
        wanted = "none" if outputs == "last" and not ends.any() else outputs
        one = partial(
            _read_round,
            params=params,
            config=config,
            plan=plan,
            outputs=wanted,
            recompute=recompute,
            layouts=layouts,
            finish=finish,
            layers=layers,
        )
        part = (
            one(text, state, recorder=recorder)
            if reread is None
            else reread(one, text, state, params, recorder)
        )
        if part.cut:
            cut = np.asarray(plan.cut) | cuts_all
            part = replace(part, state=_detach_rows(part.state, cut))
        state = part.state
        yield part


@untraced()
def count_alike(state: CoMeTState, plans: Iterable[Round], memory: MemoryConfig) -> int:
    """How many of the next rounds are whole chunks of one layout: those of full memories.

    Args:
        state: where the streams stand before them.
        plans: the rounds, of which one after the other is looked at.
        memory: of the model.
    """
    is_steady = (
        not state.row_length.any()
        and (not memory.has_global or (state.chunks > 0).all())
        and (not memory.has_temporary or (state.queue_length == memory.temporary_memory_size).all())
    )
    size, count = None, 0
    for plan in plans if is_steady else ():
        size = int(plan.take[0]) if size is None else size
        whole = (plan.take == size).all() and plan.close.all() and not np.any(plan.cut)
        if not (size and whole and (plan.start == plan.start[0]).all()):
            break
        count += 1
    return count


def read_alike(
    text: Tensor,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    plans: Sequence[Round],
    stacked: Stacked,
    layouts: Layouts,
    outputs: str,
) -> Iterator[Reading]:
    """Rounds of `count_alike`, along diagonals; arguments are as in `run_row`.

    Yields:
        What `run_row` returns for each. Where no output is asked for, it is computed all the same.
    """
    starting = replace(state, row_length=count_memory_slots(state, config.memory))
    columns = text.shape[1] - 1
    laid_out, first, layout = _lay_out(
        starting, plans[0], params, config, "all", columns, True, layouts
    )
    rows = [
        replace(first, columns=first.columns + int(plan.start[0] - plans[0].start[0]))
        for plan in plans
    ]
    chunks = read_diagonals(
        [take_slots(text, row.columns) for row in rows],
        first,
        layout,
        state.global_state,
        state.temporary_memory,
        stacked,
        params,
        config,
    )
    for plan, row, (hidden, states, queue) in zip(plans, rows, chunks, strict=True):
        after = replace(starting, global_state=states, temporary_memory=queue)
        state = _count(after, plan, laid_out, config)
        starting = replace(state, row_length=count_memory_slots(state, config.memory))
        yield Reading(hidden if outputs == "all" else hidden[:, :0], row, state, False)


def _read_round(
    text: Tensor,
    state: CoMeTState,
    params: Weights,
    config: CoMeTConfig,
    *,
    plan: Round,
    outputs: str,
    recorder: Recorder | None,
    recompute: Recompute | None,
    layouts: Layouts,
    finish: Callable[[Reading], Reading] | None,
    layers: RunLayers,
) -> Reading:
    """`run_row`, and `finish`; arguments are as in `read`."""
    part = run_row(
        text,
        state,
        params,
        config,
        plan=plan,
        outputs=outputs,
        recorder=recorder,
        recompute=recompute,
        layouts=layouts,
        layers=layers,
    )
    return part if finish is None else finish(part)


def _detach_rows(state: CoMeTState, rows: np.ndarray) -> CoMeTState:
    """The state through which no gradient flows back for some sequences, [b] bool."""
    return state.map_tensors(lambda t: _where_rows(rows, t.detach(), t))


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
    nothing = np.zeros(state.batch_size, dtype=np.int64)
    plan = Round(start=nothing, take=nothing, close=closes)
    text = torch.zeros((state.batch_size, 1), dtype=torch.int64, device=params["norm"].device)
    return run_row(text, state, params, config, plan=plan, outputs="none", recorder=recorder).state
