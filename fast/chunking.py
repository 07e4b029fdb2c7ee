"""Which slots a call adds to the rows of a batch: twin of `reference/chunking.py`.

The ways of cutting a text are plain integer arithmetic and are the reference's own. What is
added here is the batch: a call becomes rounds, and in a round every sequence adds some text to
its open chunk, closes it, does both, or waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from reference.chunking import (
    at_boundaries,
    fixed_size,
    random_sizes,
    right_aligned,
    uniform,
)
from reference.config import MemoryConfig

__all__ = [
    "Layout",
    "Round",
    "at_boundaries",
    "fixed_size",
    "lay_out",
    "lay_out_batch",
    "plan_rounds",
    "random_sizes",
    "right_aligned",
    "uniform",
]

Slots = tuple[int, ...]
COMPRESSION, READOUT = -1, -2


@dataclass(frozen=True)
class Round:
    """One step of all sequences of a batch: at most one chunk of text each."""

    take: np.ndarray
    """[b] int64: text tokens each sequence reads."""

    close: np.ndarray
    """[b] bool: whether its open chunk closes behind them."""


def plan_rounds(
    lengths: np.ndarray,
    open_tokens: np.ndarray,
    chunk_size: int | None,
    chunk_sizes: Sequence[int] | None = None,
) -> list[Round]:
    """The rounds that read a call's text.

    A chunk closes when a token more than `chunk_size` arrives, so a full chunk stays open at the
    end of a call.

    Args:
        lengths: [b] int64, text tokens of each sequence in this call.
        open_tokens: [b] int64, text tokens already in its open chunk.
        chunk_size: text tokens of a chunk; None never closes one.
        chunk_sizes: the chunks of this call by hand, for all sequences alike, instead of
            `chunk_size`; the first goes on with the open chunk, the last stays open.

    Returns:
        Rounds in order; none if there is nothing to read.
    """
    if chunk_sizes is not None:
        everyone = np.ones(len(lengths), dtype=np.int64)
        last = len(chunk_sizes) - 1
        return [
            Round(size * everyone, (everyone > 0) & (i < last))
            for i, size in enumerate(chunk_sizes)
        ]
    if chunk_size is None:
        return [Round(lengths, np.zeros(len(lengths), dtype=bool))] if lengths.any() else []
    rounds = []
    remaining, filled = lengths.copy(), open_tokens.copy()
    while remaining.any():
        take = np.minimum(remaining, np.maximum(chunk_size - filled, 0))
        remaining = remaining - take
        close = remaining > 0
        filled = np.where(close, 0, filled + take)
        rounds.append(Round(take, close))
    return rounds


@lru_cache(maxsize=64)  # a steady stream has a handful of layouts
def lay_out(
    open_tokens: int, take: int, close: bool, stride: int, readouts: int, trailing: bool
) -> Slots:
    """What one sequence adds to its row, in order.

    A compression token is laid before the text token that follows a full group of `stride`, and
    one for the last group when the chunk closes. To lay it at once or only when more text comes
    is the same, since no text token before it sees it; so the last group is one rule, full or not.

    Args:
        open_tokens: text tokens already in the open chunk.
        take: text tokens added.
        close: whether the chunk closes behind them.
        stride: text tokens per compression token, 0 for none.
        readouts: readout tokens laid on closing.
        trailing: whether the last group has its compression token.

    Returns:
        Per slot: j >= 0 for the j-th text token added, COMPRESSION, or READOUT - r for readout r.
    """
    slots: list[int] = []
    for j in range(take):
        before = open_tokens + j
        if stride and before and before % stride == 0:
            slots.append(COMPRESSION)
        slots.append(j)
    if close:
        if stride and trailing:
            slots.append(COMPRESSION)
        slots.extend(READOUT - r for r in range(readouts))
    return tuple(slots)


@dataclass(frozen=True)
class Layout:
    """The slots that a batch adds in a round, as indices. Rows alike have one row of them.

    Rows are padded at the right to the longest. [rows] is [1] where the batch is alike.
    """

    source: np.ndarray
    """[rows, n]: into [text tokens of the round | the compression token | readout tokens]."""

    count: np.ndarray
    """[rows]: slots that are not padding."""

    text: np.ndarray
    """[rows, take]: slot of every text token."""

    compression: np.ndarray
    """[rows, c]: slot of every compression token."""

    compression_count: np.ndarray
    """[rows]: compression tokens that are not padding."""

    readout: np.ndarray
    """[rows, m]: slots of the readout tokens; zeros where a row does not close."""

    def trim(self, take: np.ndarray, outputs: str, closes: bool) -> tuple[np.ndarray, Layout]:
        """The slots whose output is read at the top layer, where text may not be.

        Args:
            take: [rows] text tokens of the round.
            outputs: text tokens that are read: each row's "last", or "none".
            closes: whether the readout tokens are read.

        Returns:
            [rows, a] those slots; the layout of the output at them, in that order.
        """
        text = self.text[:, :0]
        if outputs == "last":
            text = np.take_along_axis(self.text, np.maximum(take - 1, 0)[:, None], axis=1)
        parts = [text, self.compression, self.readout if closes else self.readout[:, :0]]
        ends = np.cumsum([part.shape[1] for part in parts])
        places = np.split(np.arange(ends[-1])[None], ends[:-1], axis=1)
        text, compression, readout = places
        trimmed = replace(self, text=text, compression=compression, readout=readout)
        return np.concatenate(parts, axis=1), trimmed


def lay_out_batch(
    open_tokens: np.ndarray, take: np.ndarray, close: np.ndarray, config: MemoryConfig
) -> Layout:
    """`lay_out` for every sequence, as indices that a device can gather by.

    Args:
        open_tokens, take: [rows] int64.
        close: [rows] bool.

    Returns:
        The `Layout`.
    """
    m, stride, trailing = (
        config.global_memory_size,
        config.compression_stride,
        config.trailing_compression,
    )
    rows = [
        lay_out(int(c), int(k), bool(x), stride, m, trailing)
        for c, k, x in zip(open_tokens, take, close, strict=True)
    ]
    widest = int(take.max())
    place = {COMPRESSION: widest} | {READOUT - r: widest + 1 + r for r in range(m)}

    def padded(lists: list[list[int]]) -> np.ndarray:
        width = max(map(len, lists))
        return np.array([x + [0] * (width - len(x)) for x in lists], dtype=np.int64)

    def where(kind: range) -> list[list[int]]:
        return [[i for i, slot in enumerate(row) if slot in kind] for row in rows]

    compression = where(range(COMPRESSION, COMPRESSION + 1))
    return Layout(
        source=padded([[place.get(slot, slot) for slot in row] for row in rows]),
        count=np.array([len(row) for row in rows]),
        text=padded(where(range(widest))),
        compression=padded(compression),
        compression_count=np.array([len(x) for x in compression]),
        readout=padded([x or [0] * m for x in where(range(READOUT - m + 1, READOUT + 1))]),
    )
