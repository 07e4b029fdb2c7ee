"""Other ways to read with a backbone, with the stream's face: what memories are compared with.

- **full**: full attention over the whole text, while it fits.
- **window**: the last tokens alone, as many as a given number of bytes holds keys and values of.

Both are the backbone itself; nothing of them is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.config import MemoryConfig

from ..baselines import Baseline, is_baseline
from ..inputs import check_count
from ..model import CoMeTGeneration, CoMeTModel
from ..pretrained.text import open_text
from ..reading import Source
from .samples import Words

__all__ = [
    "READERS",
    "LastTokens",
    "LastTokensState",
    "open_model",
    "open_reader",
    "window_size",
    "without_memories",
]

READERS = ("memories", "full", "window")
"""What a backbone may be read with."""


@dataclass(frozen=True)
class LastTokensState:
    """Where streams stand."""

    ids: Tensor
    """[b, n] the tokens that are still known."""

    def select(self, rows: Sequence[int]) -> LastTokensState:
        """The streams of some rows, which may be named more than once."""
        return LastTokensState(self.ids[list(rows)])


def without_memories(model: CoMeTModel, chunk_size: int = 2**40) -> CoMeTModel:
    """The backbone of a model, with the same weights, each chunk by itself.

    Args:
        model: with memories.
        chunk_size: tokens of a chunk; the default never closes one, which is full attention.
    """
    plain = MemoryConfig(chunk_size=chunk_size, global_memory_size=0, compression_stride=0)
    memories = ("global_memory", "temporary_memory")
    special = ("compression_embedding", "readout_embeddings")
    weights = model.weights.to_dict()
    kept = {name: value for name, value in weights.items() if name not in special}
    kept["layers"] = [{k: v for k, v in w.items() if k not in memories} for w in weights["layers"]]
    return CoMeTModel(dataclasses.replace(model.config, memory=plain), kept)


class LastTokens:
    """A backbone without memories that knows the last tokens of what it has read.

    They are read when something is asked, at the positions from 0 on, all at once.

    Args:
        model: of which the weights are taken; its memories are left out.
        size: tokens that are known, with the question.
    """

    def __init__(self, model: CoMeTModel, size: int) -> None:
        self.model, self.size = without_memories(model), check_count("size", size, 1)

    def __call__(
        self, ids: Tensor, *, state: LastTokensState | None = None, logits: str = "none"
    ) -> Any:
        """Read on; see `harness.Reader`. Nothing is predicted."""
        joined = ids if state is None else torch.cat([state.ids, ids], dim=1)
        return _Read(LastTokensState(joined[:, -self.size :]))

    def generate(
        self,
        ids: Tensor,
        state: LastTokensState | None = None,
        max_new_tokens: int = 128,
        stop_ids: Collection[int] = (),
        *,
        lengths: Any = None,
    ) -> CoMeTGeneration:
        """Go on from [b, n] ids, padded at the right; see `CoMeTModel.generate`."""
        sizes = [ids.shape[1]] * len(ids) if lengths is None else [int(n) for n in lengths]
        rows = []
        for i, n in enumerate(sizes):
            known = ids[i, :n] if state is None else torch.cat([state.ids[i], ids[i, :n]])
            rows.append(known[-self.size :])
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        found = [len(row) for row in rows]
        return self.model.generate(padded, None, max_new_tokens, stop_ids, lengths=found)


@dataclass(frozen=True)
class _Read:
    state: LastTokensState


def open_model(source: Source) -> tuple[Any, Words]:
    """The model that is evaluated, CoMeT or a baseline, and its tokenizer.

    Raises:
        ImportError, OSError, ValueError: as `Source.open`.
    """
    folder = Path(source.path)
    if source.memory is not None or not is_baseline(folder):
        return source.open()
    if source.dtype not in (None, "float32"):
        raise ValueError(
            f"{folder} holds a baseline, which computes in float32, not {source.dtype}."
        )
    model = Baseline.from_pretrained(folder)
    return model, open_text(folder, model.config.backbone.vocab_size)


def window_size(model: CoMeTModel, budget: int) -> int:
    """Tokens whose keys and values take at most so many bytes, in all layers together.

    Raises:
        ValueError: there is no room for one.
    """
    backbone = model.config.backbone
    numbers = 2 * backbone.num_hidden_layers * backbone.num_key_value_heads * backbone.head_dim
    size = numbers * model.weights["norm"].element_size()
    if budget < size:
        raise ValueError(
            f"the budget is {budget} bytes; keys and values of one token take {size}, so give more."
        )
    return budget // size


def open_reader(kind: str, model: CoMeTModel, budget: int | None = None) -> Any:
    """A model by the way that it is to read.

    Args:
        kind: one of `READERS`.
        model: with memories.
        budget: bytes of a window's keys and values; None is as many as the memories of a stream take,
            full and with no chunk open.

    Raises:
        ValueError: a budget of another reader than a window, or too small for one token.
    """
    if budget is not None and kind != "window":
        raise ValueError(f"a budget of {budget} bytes is of the reader window, not of {kind}.")
    if kind == "memories":
        return model
    if isinstance(model, Baseline):
        raise ValueError(f"the reader {kind} is of CoMeT's backbone; a baseline reads by itself.")
    if kind == "full":
        return without_memories(model)
    memory, backbone = model.config.memory, model.config.backbone
    slots = memory.global_memory_size + memory.temporary_memory_size
    size = backbone.num_hidden_layers * slots * backbone.hidden_size
    size *= model.weights["norm"].element_size()
    return LastTokens(model, window_size(model, size if budget is None else budget))
