"""How a call's text is cut into rounds: twin of `reference/chunking.py`.

The ways of cutting a text are plain integer arithmetic and are the reference's own. What is
added here is the batch: a call becomes rounds, and in a round every sequence adds some text to
its open chunk, closes it, does both, or waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reference.chunking import (
    at_boundaries,
    fixed_size,
    random_sizes,
    right_aligned,
    uniform,
)

__all__ = [
    "Round",
    "at_boundaries",
    "fixed_size",
    "plan_rounds",
    "random_sizes",
    "right_aligned",
    "uniform",
]


@dataclass(frozen=True)
class Round:
    """One step of all sequences of a batch: at most one chunk of text each."""

    start: np.ndarray
    """[b] int64: column of the call where each sequence's text of this round starts."""

    take: np.ndarray
    """[b] int64: text tokens each sequence reads."""

    close: np.ndarray
    """[b] bool: whether its open chunk closes after them."""

    cut: np.ndarray | bool = False
    """[b] bool: whether gradients are cut after that; of all sequences that go on, or of none."""


def plan_rounds(
    lengths: np.ndarray,
    open_tokens: np.ndarray,
    chunk_size: int | None,
    chunk_sizes: Sequence[int] | None = None,
    chunks: np.ndarray | None = None,
    backprop_chunks: int | None = None,
) -> Iterator[Round]:
    """The rounds that read a call's text.

    A chunk closes when a token more than `chunk_size` arrives, so a full chunk stays open at the
    end of a call. A sequence that comes to a border where gradients are cut waits there for the
    others, so that one round ends the window of all.

    Args:
        lengths: [b] int64, text tokens of each sequence in this call.
        open_tokens: [b] int64, text tokens already in its open chunk.
        chunk_size: text tokens of a chunk; None never closes one.
        chunk_sizes: the chunks of this call by hand, for all sequences alike, instead of
            `chunk_size`; the first goes on with the open chunk, the last stays open.
        chunks: [b] int64, chunks that each sequence has closed; looked at with `backprop_chunks`.
        backprop_chunks: gradients are cut where a sequence closes a chunk whose number, counted
            from its start, this divides; None never cuts.

    Yields:
        Rounds in order; none if there is nothing to read.
    """
    start, closed = np.zeros_like(lengths), np.zeros_like(lengths)
    waits = np.zeros(lengths.shape, dtype=bool)
    while (start < lengths).any():
        room: Any = lengths  # as much as there is
        if chunk_sizes is not None:
            room = np.asarray(chunk_sizes)[closed]
        elif chunk_size is not None:
            room = np.maximum(chunk_size - open_tokens, 0)
        take = np.where(waits, 0, np.minimum(lengths - start, room))
        close = start + take < lengths
        close &= ~waits
        begin, start, closed = start, start + take, closed + close
        open_tokens = np.where(close, 0, open_tokens + take)
        if backprop_chunks is not None:
            waits = waits | (close & ((chunks + closed) % backprop_chunks == 0))
        cut = waits & (waits | (start == lengths)).all()
        waits = waits & ~cut
        yield Round(begin, take, close, cut)
