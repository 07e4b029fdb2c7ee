"""How a round is laid out: which slot of a row holds what, by arithmetic, without a device.

A row that holds t text tokens of its chunk has laid t + max(t - 1, 0) // s slots after its memory
slots: a compression token stands before the text token that follows a full group of s. Counted from
there, slot j is a compression token where j mod (s + 1) = s, and else text token
(j div (s + 1)) s + j mod (s + 1). When the chunk closes, the last group's compression token and the
readout tokens follow. To lay a full group's token at once, or only when more text comes, is the
same, since no text token before it sees it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reference.config import MemoryConfig

from .chunking import Round

if TYPE_CHECKING:
    from .state import CoMeTState

__all__ = ["KINDS", "Row", "count_memory_slots", "count_round", "lay_out", "slot_kinds"]

Index = Any
"""An integer array: NumPy's where it is laid out, a device's after `Row.map`."""

KINDS = ("global", "temporary", "text", "compression", "readout")
"""What a slot of a row holds, by number, in the order in which they stand there first. A sink counts
as global."""

NEVER = 2**40
"""A stride longer than any chunk: no group is ever full."""


@dataclass(frozen=True)
class Row:
    """The new slots of every row of a batch in one round, as int64 indices to gather by.

    Arrays have one row where all sequences are alike, [1, ...], else one each: r is 1 or b. Rows
    are padded at the right to the longest; padding stands after a row's own slots, where none of
    them sees it.
    """

    columns: Index
    """[r, w]: columns of the call that are read, w at most; padding reads the one after them."""

    source: Index
    """[r, n]: each slot's place in [text of the round | the compression token | readout tokens]."""

    positions: Index
    """[r, n]: positions in the row."""

    text: Index
    """[r, w]: slot of every text token."""

    compression: Index
    """[r, c]: slot of every compression token."""

    readout: Index
    """[r, m]: slots of the readout tokens; [r, 0] where no chunk closes."""

    queried: Index | None
    """[r, a]: slots whose output the top layer computes: some text, then those of `compression`,
    then those of `readout`; None is all, in the row's order."""

    last: Index
    """[r, 1]: each sequence's last text token in the top layer's output at text tokens."""

    take: Index
    """[r, 1]: text tokens that are read."""

    entries: Index
    """[r, 1]: compression tokens that are not padding."""

    queue_length: Index
    """[r, 1]: entries in the queue before the round."""

    has_state: Index
    """[r, 1]: 1 where a chunk has closed before, so that there is a global state; else 0. On a
    device, None where all have one."""

    closes: Index
    """[r, 1]: 1 where the chunk closes, else 0."""

    @property
    def is_shared(self) -> bool:
        """Whether one index serves all sequences: they are alike."""
        return len(self.take) == 1

    def map(self, function: Callable[[np.ndarray, list[int]], Sequence[Index]]) -> Row:
        """The row elsewhere, in one copy.

        Args:
            function: gets all indices side by side, [r, ...], and their widths, and returns them
                apart, as they are to be.
        """
        arrays = {name: x for name, x in vars(self).items() if x is not None}
        whole = np.concatenate(list(arrays.values()), axis=1)
        parts = function(whole, [x.shape[1] for x in arrays.values()])
        return dataclasses.replace(self, **dict(zip(arrays, parts, strict=True)))


def count_memory_slots(state: CoMeTState, memory: MemoryConfig) -> np.ndarray:
    """Slots of both memories that a row starts with, were it to start now.

    Args:
        state: where the streams stand. Only counts are read.
        memory: of the model.

    Returns:
        [b] int64.
    """
    return (state.chunks > 0) * memory.global_slots + state.queue_length


def lay_out(
    state: CoMeTState, plan: Round, memory: MemoryConfig, num_columns: int, outputs: str = "all"
) -> Row:
    """Lay a round out.

    Args:
        state: where the streams stand; rows with new slots have been opened. Only counts are read.
        plan: what each sequence reads, and whether its chunk closes.
        memory: chunking and memories.
        num_columns: of the call.
        outputs: text tokens whose output is asked for: "all", each sequence's "last", or "none".

    Returns:
        The row, in NumPy.
    """
    m, stride = memory.global_memory_size, memory.compression_stride or NEVER
    counts = np.stack(
        [
            *(plan.start, plan.take, plan.close, state.open_tokens),
            *(state.row_length, state.queue_length, state.chunks > 0),
        ]
    )  # [7, b]
    if (counts == counts[:, :1]).all():
        counts = counts[:, :1]
    start, take, closes, old, row_length, queue_length, has_state = counts[..., None]  # [r, 1]
    tokens = old + take  # text tokens in the chunk, those of earlier rounds first
    trailing = closes * (memory.has_temporary and memory.trailing_compression)
    old_groups, groups = (np.maximum(t - 1, 0) // stride for t in (old, tokens))
    first, laid = old + old_groups, tokens + groups  # slots laid before this round, and with it
    new = laid - first  # [r, 1] slots of text and of full groups
    entries = groups - old_groups + trailing
    widest, slots = int(take.max()), int((new + trailing + m * closes).max())

    j = np.arange(slots)
    group, rest = np.divmod(first + j, stride + 1)
    source = np.where(rest == stride, widest, group * stride + rest - old)
    source = np.where(j < new, source, widest + 1 - trailing + j - new)
    source = np.where(j < new + trailing + m * closes, source, 0)

    j = np.arange(widest)
    is_text = j < take
    columns = np.where(is_text, start + j, num_columns)
    text = np.where(is_text, old + j + (old + j) // stride - first, 0)
    j = np.arange(int(entries.max()))
    compression = np.minimum((old_groups + j) * (stride + 1) + stride, laid) - first
    compression = np.where(j < entries, compression, 0)
    readout = closes * (new + trailing + np.arange(m if closes.any() else 0))
    last = np.maximum(take - 1, 0)
    queried = None
    if outputs != "all":
        asked = np.take_along_axis(text, last, axis=1) if outputs == "last" else text[:, :0]
        queried = np.concatenate([asked, compression, readout], axis=1)
        last = 0 * last
    return Row(
        columns=columns,
        source=source,
        positions=row_length + np.arange(slots),
        text=text,
        compression=compression,
        readout=readout,
        queried=queried,
        last=last,
        take=take,
        entries=entries,
        queue_length=queue_length,
        has_state=has_state,
        closes=closes,
    )


def count_round(
    state: CoMeTState, plan: Round, row: Row, memory: MemoryConfig
) -> dict[str, np.ndarray]:
    """The state's counts after a round.

    Args:
        state, plan, memory: as in `lay_out`.
        row: what it returned.

    Returns:
        [b] int64 each, by the names that they have in a state.
    """
    new = (row.take + row.entries)[:, 0]  # slots of rows that go on: those have no readout tokens
    return {
        "tokens": state.tokens + plan.take,
        "chunks": state.chunks + plan.close,
        "open_tokens": np.where(plan.close, 0, state.open_tokens + plan.take),
        "row_length": np.where(plan.close, 0, state.row_length + new),
        "queue_length": np.minimum(
            state.queue_length + row.entries[:, 0], memory.temporary_memory_size
        ),
    }


def slot_kinds(state: CoMeTState, plan: Round, memory: MemoryConfig) -> np.ndarray:
    """What each slot of every row holds, once a round has been read.

    Args:
        state, plan, memory: as in `lay_out`.

    Returns:
        [b, l] int64 numbers in `KINDS`; -1 after a row's end.
    """
    stride = memory.compression_stride or NEVER
    old, tokens = state.open_tokens, state.open_tokens + plan.take
    memory_slots = state.row_length - old - np.maximum(old - 1, 0) // stride  # 0 in a closed row
    global_slots = np.minimum((state.chunks > 0) * memory.global_slots, memory_slots)
    laid = tokens + np.maximum(tokens - 1, 0) // stride
    ends = np.cumsum(
        [
            global_slots,
            memory_slots - global_slots,
            laid,
            plan.close * (memory.has_temporary and memory.trailing_compression),
            plan.close * memory.global_memory_size,
        ],
        axis=0,
    )  # [5, b]
    slot = np.arange(ends[-1].max())
    kinds = (slot >= ends[:, :, None]).sum(axis=0)  # [b, l]
    inside = (kinds == KINDS.index("text")) & (
        (slot - memory_slots[:, None] + 1) % (stride + 1) == 0
    )
    kinds[inside] = KINDS.index("compression")
    kinds[kinds == len(KINDS)] = -1
    return kinds
