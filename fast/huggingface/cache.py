"""Where a batch of streams stands, as what transformers calls a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from ..arrays import shown
from ..inputs import check_kind
from ..state import CoMeTState

__all__ = ["TAIL", "CoMeTCache"]

TAIL = 16
"""Columns whose ids are remembered, to tell a text that goes on from one that begins elsewhere."""


class CoMeTCache(Cache):
    """The state of a batch of streams, constant in size however much they have read.

    A model's call moves it on in place, as it does every cache of transformers; the state itself is
    a value, so that `copy.copy(cache)` is a branch of its own, at no cost.

        out = model(document)                          # read once
        branch = CoMeTCache(out.cache.state.fork(3))   # ask three times
        model.generate(questions, cache=branch)

    Columns are counted, as transformers counts them: padding too, and from where the cache began. A
    cache that is made from a state begins there, so that new ids can be given alone.
    """

    def __init__(self, state: CoMeTState | None = None) -> None:
        """A cache at a state, or one that has read nothing.

        Args:
            state: such as `out.cache.state`, `fast.CoMeTOutput.state`, or one from a file.

        Raises:
            ValueError: it is not a state.
        """
        super().__init__(layers=[])
        if state is not None:
            check_kind("state", state, CoMeTState, "a CoMeTState, such as out.cache.state")
        self.state = state
        self.columns = 0
        """Columns read since the cache began, padding included."""
        self.last: Tensor | None = None
        """[b, d], the top layer's output at each stream's last token; None before the first."""
        self.tail: Tensor | None = None
        """[b, at most TAIL] ids of the last columns, in padding any; None where embeddings were
        read."""

    def advance(self, state: CoMeTState, last: Tensor, ids: Tensor | None, columns: int) -> None:
        """Move on: what a model's call ends with.

        Args:
            state, last: after it.
            ids: [b, n] of its columns, or None where it was given embeddings.
            columns: n.
        """
        if ids is None:
            self.tail = None
        elif self.tail is None or not self.columns:
            self.tail = ids[:, -TAIL:].clone()
        else:
            self.tail = torch.cat([self.tail, ids], dim=1)[:, -TAIL:]
        self.state, self.last = state, last
        self.columns += columns

    def check_continues(self, ids: Tensor) -> None:
        """Raise ValueError unless ids are what was read, and more.

        Args:
            ids: [b, n] of all columns since the cache began.
        """
        new, known = ids.shape[1] - self.columns, self.tail
        fits = new > 0
        if fits and known is not None:
            fits = torch.equal(ids[:, self.columns - known.shape[1] : self.columns], known)
        if not fits:
            raise ValueError(
                f"the cache has read {self.columns} columns, and the {ids.shape[1]} of input_ids do "
                "not begin with those; give the whole text, or new ids alone with "
                "cache=CoMeTCache(cache.state)."
            )

    def _map(self, function: Any, state: CoMeTState) -> None:
        self.state = state
        self.last = None if self.last is None else function(self.last)
        self.tail = None if self.tail is None else function(self.tail)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take some of the streams, in the order given; one may be taken more than once.

        Args:
            beam_idx: [any] integers in [0, b).
        """
        if self.state is not None:
            index = beam_idx.to(torch.int64)
            state = self.state.select(index.tolist())
            self._map(lambda x: x.index_select(0, index.to(x.device)), state)

    def batch_select_indices(self, indices: Tensor) -> None:
        """`reorder_cache`, by its other name."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each stream side by side."""
        if self.state is not None:
            self._map(lambda x: x.repeat_interleave(repeats, dim=0), self.state.fork(repeats))

    def reset(self) -> None:
        """Forget all that was read."""
        self.state = self.last = self.tail = None
        self.columns = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: memories cannot take back what they have read.

        Raises:
            ValueError: tokens_to_remove is not 0.
        """
        if tokens_to_remove:
            raise ValueError(
                f"tokens_to_remove is {shown(tokens_to_remove)}, but memories cannot take back what "
                "they have read; keep copy.copy(cache) from before instead."
            )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read since the cache began, padding included."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no longest text."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Columns that a mask would cover, and where they begin."""
        return self.columns + query_length, 0

    @property
    def batch_size(self) -> int:
        """Streams, or -1 before the first text."""
        return -1 if self.state is None else self.state.batch_size

    @property
    def is_linear(self) -> list[bool]:
        """[False]: `generate` cuts off what has been read."""
        return [False]

    @property
    def is_croppable(self) -> bool:
        """False."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether a text has been read."""
        return self.state is not None

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.keys)

    def __repr__(self) -> str:
        return f"CoMeTCache(batch_size={self.batch_size}, columns={self.columns})"
