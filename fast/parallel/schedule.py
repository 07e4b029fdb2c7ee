"""Which chunks a text has, what their rows hold, and which worker reads which: arithmetic alone.

Every worker knows this of all chunks, those of others too, so that a message between workers needs
no head: both sides know its size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reference.config import CoMeTConfig

from ..chunking import plan_rounds
from ..rows import Row, count_memory_slots, count_round, lay_out
from ..stream import new_state

__all__ = ["Chunk", "deal", "plan_chunks"]


@dataclass(frozen=True)
class Chunk:
    """One round of a text that is read from its start: a chunk of every sequence that goes on."""

    number: int
    """Counted from 0."""

    row: Row
    """How it is laid out, on the host."""

    slots: int
    """Memory slots that the longest row starts with."""

    queue_before: int
    """Entries of the longest queue before it."""

    queue_after: int
    """Entries of the longest queue after it."""


def plan_chunks(
    config: CoMeTConfig,
    lengths: np.ndarray,
    num_columns: int,
    chunk_sizes: Sequence[int] | None = None,
) -> list[Chunk]:
    """The chunks of a batch of texts.

    A sequence whose text has ended waits in the chunks that follow: it lays no slots, and its
    memories pass through as they are. Those that read have all read as much before, so their rows
    start alike, and what is longest is theirs.

    Args:
        config: the model.
        lengths: [b] int64 tokens of each sequence.
        num_columns: tokens of the longest.
        chunk_sizes: as in a call of the model.

    Returns:
        Chunks in the order of the text.
    """
    memory = config.memory
    found: list[Chunk] = []
    state = new_state(config, torch.float32, len(lengths), "meta")  # counts, and no tensors
    for plan in plan_rounds(lengths, state.open_tokens, memory.chunk_size, chunk_sizes):
        # Every row starts anew: the chunk before it has closed.
        slots = count_memory_slots(state, memory)
        state = dataclasses.replace(state, row_length=slots)
        row = lay_out(state, plan, memory, num_columns)
        counts: dict[str, Any] = count_round(state, plan, row, memory)
        before, after = int(state.queue_length.max()), int(counts["queue_length"].max())
        found.append(Chunk(len(found), row, int(slots.max()), before, after))
        state = dataclasses.replace(state, **counts)
    return found


def deal(chunks: Sequence[Chunk], block: int) -> list[Sequence[Chunk]]:
    """Blocks of consecutive chunks; block k is read by worker k modulo their number.

    Args:
        chunks: of a text.
        block: chunks of a block; the last has what is left.
    """
    return [chunks[start : start + block] for start in range(0, len(chunks), block)]
