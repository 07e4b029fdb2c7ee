"""Watch a model read: its gates, how far its memories move, and what its attention looks at.

    recorder = Recorder()
    model(ids, recorder=recorder)  # or generate, or close_chunk; an engine's too
    recorder.rounds[3].gate[0]

A round is a chunk, or a piece of one where a call begins or ends inside it. What is recorded is
computed beside the reading, from the same weights, and changes nothing in it; without a recorder
nothing is computed. Numbers are NumPy's, on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from array_api_compat import array_namespace, device

from reference.config import CoMeTConfig, MemoryConfig

from .arrays import Array, to_host
from .chunking import Round
from .cupy_engine.global_memory import gate, propose
from .cupy_engine.layers import (
    causal_mask,
    project_queries,
    rms_norm,
    softmax,
    take_slots,
    widen,
)
from .rows import Row, slot_kinds
from .state import CoMeTState

__all__ = ["RecordedRound", "Recorder"]

SEEN = 4
"""Kinds of slots that a text token can see, the first of `rows.KINDS`: all but readout tokens."""


@dataclass(frozen=True)
class RecordedRound:
    """One round of a batch of b streams. Lists have an item a layer, bottom first."""

    tokens: np.ndarray
    """[b] text tokens that each stream had read before."""

    take: np.ndarray
    """[b] text tokens that it reads in this round."""

    chunk: np.ndarray
    """[b] number of the chunk that they belong to, from 0."""

    closes: np.ndarray
    """[b] bool, whether the chunk closes after them."""

    kinds: np.ndarray
    """[b, l] what each slot of the row is, a number in `rows.KINDS`; -1 after the row's end."""

    ages: np.ndarray
    """[b, q] text tokens read since each entry of the queue was made, oldest entry first, after the
    round. -1 where it was made before the recorder watched; those after the queue's end too."""

    gate: list[np.ndarray] = field(default_factory=list)
    """[b, m, 1] or, with a vector gate, [b, m, d]: the share of S that each slot keeps, 0 on a
    stream's first chunk. NaN where the chunk does not close; no item where none does."""

    moved: list[np.ndarray] = field(default_factory=list)
    """[b, m] How far each slot of S moved: the length of its change over its new length. NaN and
    absent as in `gate`."""

    attention: list[np.ndarray] = field(default_factory=list)
    """[b, h, w, 4] the attention of each query head of each text token of the round on the first
    four of `rows.KINDS`, summed over their slots; they add up to 1. A sink is counted with the
    global memory. NaN in padding."""


class Recorder:
    """Keeps what a model does while it reads. It follows the streams of one batch: after `select`
    or `fork`, take a new one.
    """

    def __init__(self) -> None:
        self.rounds: list[RecordedRound] = []
        """What was recorded, in order."""
        self._made: list[np.ndarray] = []  # a stream: tokens read when each queue entry was made

    def begin(self, state: CoMeTState, plan: Round, row: Row, config: CoMeTConfig) -> None:
        """Start a round.

        Args:
            state: where the streams stand; rows with new slots have been opened.
            plan: what each sequence reads, and whether its chunk closes.
            row: how it is laid out, on the host.
            config: the model.
        """
        self._row, self._config = row, config
        self.rounds.append(
            RecordedRound(
                tokens=state.tokens,
                take=plan.take,
                chunk=state.chunks,
                closes=plan.close,
                kinds=slot_kinds(state, plan, config.memory),
                ages=self._queue_ages(state, plan, config.memory),
            )
        )

    def _queue_ages(self, state: CoMeTState, plan: Round, memory: MemoryConfig) -> np.ndarray:
        """`RecordedRound.ages`, from what is known of the entries before."""
        before, self._made = self._made, []
        for i, length in enumerate(state.queue_length):
            known = before[i] if len(before) == state.batch_size else np.zeros(0, np.int64)
            if len(known) != length:
                known = np.full(length, -1)
            start, old = int(state.tokens[i] - state.open_tokens[i]), int(state.open_tokens[i])
            now, stride = old + int(plan.take[i]), memory.compression_stride
            # A full group's token stands before the next text token.
            groups = range(max(old - 1, 0) // stride, max(now - 1, 0) // stride) if stride else ()
            made = [start + (group + 1) * stride for group in groups]
            if memory.has_temporary and memory.trailing_compression and plan.close[i]:
                made.append(start + now)
            entries = np.concatenate([known, np.array(made, dtype=np.int64)])
            self._made.append(entries[max(len(entries) - memory.temporary_memory_size, 0) :])
        ages = np.full((state.batch_size, max(map(len, self._made))), -1)
        for i, made_at in enumerate(self._made):
            now = int(state.tokens[i] + plan.take[i])
            ages[i, : len(made_at)] = np.where(made_at < 0, -1, now - made_at)
        return ages

    def layer(
        self,
        before: Array,
        after: Array,
        keys: Array,
        states: tuple[Array | None, Array | None],
        row: Row,
        rotation: tuple[Array, Array],
        weights: Any,
    ) -> None:
        """Record one layer of the round.

        Args:
            before: [b, n, d], its input at the new slots.
            after: [b, n, d], its output; [b, a, d] of the queried ones at the top.
            keys: [b, k, l, e] of the whole row.
            states: S before and after the round, [b, m, d] each, or None and None.
            row, rotation: of the new slots, on the device.
            weights: the layer's.
        """
        self.rounds[-1].attention.append(self._attention(before, keys, row, rotation, weights))
        m = row.readout.shape[1]
        if states[0] is None or not m:
            return
        trimmed = row.queried is not None and after.shape[1] == row.queried.shape[1]
        readout = after[:, after.shape[1] - m :, :] if trimmed else take_slots(after, row.readout)
        old, new = (to_host(widen(x)) for x in states)
        memory, net = self._config.memory, weights["global_memory"]
        candidate = propose(readout, net, memory.global_norm_eps)
        kept = to_host(widen(gate(candidate, states[0], net, memory.gate_saturation)))
        kept = kept * self._row.has_state[:, :, None]
        closes = self.rounds[-1].closes
        self.rounds[-1].gate.append(np.where(closes[:, None, None], kept, np.nan))
        length = np.linalg.norm(new, axis=-1)
        moved = np.linalg.norm(new - old, axis=-1) / np.maximum(length, np.finfo(np.float32).tiny)
        self.rounds[-1].moved.append(np.where(closes[:, None], moved, np.nan))

    def _attention(
        self, before: Array, keys: Array, row: Row, rotation: tuple[Array, Array], weights: Any
    ) -> np.ndarray:
        """`RecordedRound.attention` of one layer."""
        xp, config = array_namespace(before), self._config.backbone
        normed = rms_norm(before, weights["input_layernorm"], config.rms_norm_eps)
        normed, positions, cos, sin = (
            take_slots(x, row.text) for x in (normed, row.positions, *rotation)
        )
        queries = widen(project_queries(normed, (cos, sin), weights, config))  # [b, h, w, e]
        (b, h, w, e), k = queries.shape, keys.shape[1]
        wide_keys = xp.matrix_transpose(widen(keys))[:, :, None, :, :]
        scores = xp.reshape(queries, (b, k, h // k, w, e)) @ wide_keys / e**0.5
        shares = softmax(scores, causal_mask(positions, keys.shape[2])[:, :, None, :, :])
        shares = xp.reshape(shares, (b, h, w, keys.shape[2]))
        kinds = self.rounds[-1].kinds
        of_kind = kinds[:, None, :, None] == np.arange(SEEN)  # [b, 1, l, 4]
        found = shares[..., : kinds.shape[1]] @ xp.asarray(
            of_kind, dtype=shares.dtype, device=device(shares)
        )
        is_text = np.arange(w) < self.rounds[-1].take[:, None]
        return np.where(is_text[:, None, :, None], to_host(found), np.nan)
