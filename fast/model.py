"""The model around the stream, in PyTorch: twin of `reference/model.py`, and `CoMeTModel`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.config import CoMeTConfig

from .allocator import keep_memory
from .layers import Weights, linear, rms_norm, widen
from .parameters import ParameterTree, check_weights, initialize
from .sampling import check_sampling, sample
from .state import CoMeTState
from .stream import Reading, close_chunk, columns, join, new_state, read
from .weights import load_checkpoint, save_checkpoint

__all__ = [
    "IGNORE",
    "CoMeTGeneration",
    "CoMeTModel",
    "CoMeTOutput",
    "language_loss",
    "predict",
    "shift_labels",
    "sum_of_losses",
]

IGNORE = -100
"""Label of a token that is not predicted, as in PyTorch's cross entropy."""


def predict(hidden: Tensor, params: Weights, config: CoMeTConfig) -> Tensor:
    """Logits: rms_norm(H') W^T, W the embedding table where tied. Twin of
    `reference.model.predict`.

    Args:
        hidden: [..., d], the top layer's output at text tokens.

    Returns:
        [..., vocab].
    """
    tied = config.backbone.tie_word_embeddings
    table = params["embed_tokens"] if tied else params["lm_head"]
    return linear(rms_norm(hidden, params["norm"], config.backbone.rms_norm_eps), table)


def shift_labels(labels: Tensor, lengths: np.ndarray) -> Tensor:
    """Labels as targets of the token before them, over the whole text, before chunking.

    Args:
        labels: [b, n], a token's own id, or IGNORE.
        lengths: [b] tokens of each sequence.

    Returns:
        [b, n]: column j is the label of token j + 1; IGNORE from a sequence's last token on.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    behind = np.arange(labels.shape[1]) >= lengths[:, None] - 1
    return targets.masked_fill(torch.from_numpy(behind).to(labels.device), IGNORE)


def language_loss(logits: Tensor, labels: Tensor, lengths: np.ndarray | None = None) -> Tensor:
    """Mean over labels of -log softmax(logits), each token predicted from the one before it. Twin
    of `reference.model.language_loss`.

    Args:
        logits: [b, n, vocab].
        labels: [b, n], the text's own ids, or IGNORE where not predicted.
        lengths: [b] tokens of each sequence; None is n.

    Returns:
        Scalar, nats per label, float32 or wider; nan where nothing is predicted.
    """
    targets = shift_labels(
        labels, np.full(len(labels), labels.shape[1]) if lengths is None else lengths
    )
    return sum_of_losses(logits, targets) / (targets != IGNORE).sum()


def sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of -log softmax(logits) at the targets: [..., vocab] and [...] -> scalar."""
    return F.cross_entropy(
        widen(logits).flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def _check_integers(name: str, ids: Tensor) -> Tensor:
    """[b, n] int64 from a caller's [b, n] or [n] integers, or a ValueError."""
    if not isinstance(ids, Tensor):
        raise ValueError(
            f"{name} is a {type(ids).__name__}; expected a tensor, e.g. torch.tensor({name})."
        )
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise ValueError(f"{name} has dtype {ids.dtype}; expected integers, e.g. {name}.long().")
    return ids[None].long() if ids.dim() == 1 else ids.long()


def _check_count(name: str, value: int, least: int) -> int:
    """A caller's integer of at least `least`, or a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}.")
    return int(value)


def _check_stop_ids(stop_ids: Collection[int]) -> frozenset[int]:
    """A caller's stop tokens as a set, or a ValueError."""
    if not isinstance(stop_ids, Collection) or isinstance(stop_ids, str):
        raise ValueError(f"stop_ids is {stop_ids!r}; expected ids, e.g. (2,).")
    return frozenset(_check_count("a stop id", i, 0) for i in stop_ids)


@dataclass(frozen=True)
class CoMeTGeneration:
    """What `generate` returns."""

    ids: list[list[int]]
    """New tokens of every sequence, the stop token included where one was reached."""

    state: CoMeTState
    """Where the streams stand: they have read the new tokens too."""


@dataclass(frozen=True)
class CoMeTOutput:
    """What a call returns."""

    state: CoMeTState
    """Where the streams stand behind the text."""

    logits: Tensor | None
    """[b, n, vocab] for logits="all", zero behind a sequence's length; [b, 1, vocab], after each
    sequence's last token, for "last"; None for "none"."""

    loss: Tensor | None
    """Mean negative log likelihood of the labels, nats; nan if all are IGNORE; None without."""


class CoMeTModel(nn.Module):
    """A decoder-only transformer that reads endless text in linear time and constant memory.

    `model(ids)` reads a text, `model(more, state=out.state)` reads on: however a text is split
    into calls, its logits and the state behind it are the same (a call's loss leaves out the call's
    own first token). State is a value; nothing hides in the module.
    """

    def __init__(
        self, config: CoMeTConfig, weights: dict[str, Any] | None = None, *, seed: int = 0
    ) -> None:
        """A model of given weights, or a fresh one in float32 on the CPU.

        Args:
            config: the model.
            weights: nested dict of tensors under the names of `reference.parameters.shapes`,
                which the model takes over; None starts at random.
            seed: of the random start.

        Raises:
            ValueError: weights that do not fit the config, or hold NaN or infinity.
        """
        super().__init__()
        keep_memory()
        self.config = config
        if weights is None:
            weights = initialize(config, np.random.default_rng(seed))
        else:
            check_weights(weights, config)
        self.weights = ParameterTree(weights)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights["norm"].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.weights["norm"].dtype

    def new_state(self, batch_size: int = 1) -> CoMeTState:
        """The state before any text.

        Args:
            batch_size: sequences to read side by side.

        Raises:
            ValueError: batch_size below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1.")
        return new_state(self.config, self.dtype, batch_size, self.device)

    def close_chunk(self, state: CoMeTState) -> CoMeTState:
        """End the open chunk by hand, so that what comes next starts a chunk of its own.

        Args:
            state: where the streams stand; it is not changed.

        Returns:
            The state; a sequence without text since its last chunk is as it was.

        Raises:
            ValueError: the state belongs to another model.
        """
        state.check(self.config, state.batch_size, self.dtype, self.device)
        return close_chunk(state, self.weights, self.config)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        state: CoMeTState | None = None,
        logits: str = "all",
        chunk_sizes: Sequence[int] | None = None,
        backprop_chunks: int | None = None,
    ) -> CoMeTOutput:
        """Read text.

        For reading alone use `torch.no_grad()`: with gradients on, what a backward pass needs is
        kept, and memory grows with the text unless `backprop_chunks` cuts it.

        Args:
            ids: [b, n] or [n] integer token ids in [0, vocab_size), padded at the right.
            labels: as ids, a token's own id, or IGNORE where it is not predicted. They are
                shifted inside: a token is predicted from the one before it in the same call.
            lengths: [b] tokens of each sequence, 1 to n; None is n for all.
            state: where the streams stand; None starts new ones. It is not changed.
            logits: "all", "last" (after each sequence's last token) or "none". What is not asked
                for is not computed.
            chunk_sizes: sizes in tokens, adding up to n, of the chunks to cut this text into,
                instead of the config's chunk size, all sequences alike. The first goes on with
                the open chunk, if there is one; the last stays open.
            backprop_chunks: gradients are cut at every so many chunk borders of a stream, counted
                from its start; None never cuts.

        Returns:
            A `CoMeTOutput`.

        Raises:
            ValueError: an argument does not fit; the message says which, and what would.
        """
        ids, sizes, state = self._check(ids, lengths, state)
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits is {logits!r}; expected 'all', 'last' or 'none'.")
        if chunk_sizes is not None:
            chunk_sizes = self._check_chunk_sizes(chunk_sizes, sizes, ids.shape[1])
        if backprop_chunks is not None:
            _check_count("backprop_chunks", backprop_chunks, 1)
        targets = None
        if labels is not None:
            targets = self._check_targets(labels, ids, sizes)

        parts: list[Reading] = []
        last: Tensor | None = None
        loss = widen(self.weights["norm"]).new_zeros(())
        params, config = self.weights, self.config
        outputs = logits if targets is None else "all"
        for part in read(
            ids,
            state,
            params,
            config,
            chunk_sizes=chunk_sizes,
            backprop_chunks=backprop_chunks,
            lengths=sizes,
            outputs=outputs,
        ):
            state = part.state
            if targets is not None:
                wanted = columns(targets, part.start, part.take, IGNORE)
                predicted = wanted != IGNORE
                rows = predict(part.hidden[predicted], params, config)
                loss = loss + sum_of_losses(rows, wanted[predicted])
            if logits == "all":
                parts.append(part)
            elif logits == "last":
                last = part.last(last)
        found = None
        if logits == "all":
            found = predict(join(parts, ids.shape[1]), params, config)
        elif last is not None:
            found = predict(last[:, None], params, config)
        if targets is not None:
            loss = loss / (targets != IGNORE).sum()
        return CoMeTOutput(state, found, None if targets is None else loss)

    def generate(
        self,
        ids: Tensor,
        state: CoMeTState | None = None,
        max_new_tokens: int = 128,
        stop_ids: Collection[int] = (),
        roll: bool = True,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        on_token: Callable[[list[int | None]], None] | None = None,
    ) -> CoMeTGeneration:
        """Continue a text, in constant memory however long the continuation is.

        Args:
            ids: [b, n] or [n] text to continue, n >= 1, padded at the right.
            state: where the streams stand; None starts new ones. It is not changed.
            max_new_tokens: text tokens per sequence, at most; 0 reads the text alone.
            stop_ids: a sequence ends after one of these.
            roll: whether new tokens open new chunks; False stays in the open chunk, as the
                published code does, and memory grows with the continuation.
            lengths: [b] tokens of each sequence in ids; None is n for all.
            temperature: 0 takes the likeliest token; above, samples softmax(logits / temperature).
            top_k: sample among the k likeliest only.
            top_p: sample among the fewest likeliest tokens whose probabilities reach p.
            generator: source of the samples, for the same ones again.
            on_token: called with each step's token of every sequence, None where one has ended.

        Returns:
            A `CoMeTGeneration`.

        Raises:
            ValueError: an argument does not fit; the message says which, and what would.
        """
        ids, sizes, state = self._check(ids, lengths, state)
        _check_count("max_new_tokens", max_new_tokens, 0)
        stop_ids = _check_stop_ids(stop_ids)
        check_sampling(temperature, top_k, top_p)
        config, b = self.config, len(ids)
        new: list[list[int]] = [[] for _ in range(b)]
        running = np.full(b, max_new_tokens > 0)
        with torch.no_grad():
            params = self.weights
            last: Tensor | None = None
            for part in read(ids, state, params, config, lengths=sizes, outputs="last"):
                last, state = part.last(last), part.state
            while running.any() and last is not None:
                logits = predict(last, params, config)  # [b, vocab]
                tokens = sample(logits, temperature, top_k, top_p, generator)
                step: list[int | None] = [
                    token if run else None
                    for token, run in zip(tokens.tolist(), running, strict=True)
                ]
                take = running.astype(np.int64)
                for part in read(
                    tokens[:, None], state, params, config, roll=roll, lengths=take, outputs="last"
                ):
                    last, state = part.last(last), part.state
                for row, token in enumerate(step):
                    if token is not None:
                        new[row].append(token)
                        running[row] = token not in stop_ids and len(new[row]) < max_new_tokens
                if on_token is not None:
                    on_token(step)
        return CoMeTGeneration(new, state)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each whole or not at all.

        Args:
            folder: made where it does not exist; files in it are replaced.
        """
        save_checkpoint(Path(folder), self.config, self.weights)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> CoMeTModel:
        """Read a model that `save_pretrained` wrote, or an official CoMeT checkpoint.

        Args:
            folder: with config.json and model.safetensors (or its shards and their index).

        Returns:
            The model on the CPU, in the checkpoint's dtype.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is cut short or not of this form, weights do not fit the config, or
                hold NaN or infinity.
        """
        config, weights = load_checkpoint(Path(folder))
        return cls(config, weights)

    def _check(
        self, ids: Tensor, lengths: Tensor | Sequence[int] | None, state: CoMeTState | None
    ) -> tuple[Tensor, np.ndarray, CoMeTState]:
        """The arguments of a call, in their one form, or a ValueError."""
        ids = _check_integers("ids", ids)
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(
                f"ids has shape {tuple(ids.shape)}; expected [batch, tokens] with at least one of "
                "each: an empty text has nothing to read."
            )
        if ids.device != self.device:
            raise ValueError(
                f"ids is on {ids.device}, the model on {self.device}; move one: ids.to(model.device)."
            )
        b, n = ids.shape
        sizes = np.full(b, n) if lengths is None else np.asarray(torch.as_tensor(lengths).cpu())
        if sizes.shape != (b,) or not np.issubdtype(sizes.dtype, np.integer):
            raise ValueError(f"lengths is {lengths}; expected {b} integers, one a sequence.")
        if sizes.min() < 1 or sizes.max() > n:
            raise ValueError(f"lengths is {sizes.tolist()}; expected 1 to {n} tokens each.")
        behind = torch.from_numpy(np.arange(n) >= sizes[:, None]).to(ids.device)
        ids = ids.masked_fill(behind, 0)  # padding may be anything
        vocab = self.config.backbone.vocab_size
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"ids range from {low} to {high}; expected [0, {vocab}), the model's vocabulary. "
                "Is this the model's tokenizer?"
            )
        if state is None:
            state = self.new_state(b)
        state.check(self.config, b, self.dtype, self.device)
        return ids, sizes.astype(np.int64), state

    def _check_targets(self, labels: Tensor, ids: Tensor, sizes: np.ndarray) -> Tensor:
        labels = _check_integers("labels", labels)
        if labels.shape != ids.shape or labels.device != ids.device:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}, on {labels.device}; expected "
                f"{tuple(ids.shape)} on {ids.device}, like ids."
            )
        vocab = self.config.backbone.vocab_size
        targets = shift_labels(labels, sizes)  # padding may be anything here too
        foreign = (targets != IGNORE) & ((targets < 0) | (targets >= vocab))
        if foreign.any():
            raise ValueError(
                f"labels holds {int(targets[foreign][0])}; expected [0, {vocab}), or {IGNORE} for "
                "a token that is not predicted."
            )
        return targets

    def _check_chunk_sizes(
        self, chunk_sizes: Sequence[int], sizes: np.ndarray, n: int
    ) -> list[int]:
        found = [_check_count("chunk_sizes", size, 1) for size in chunk_sizes]
        if sum(found) != n:
            raise ValueError(
                f"chunk_sizes is {found}, {sum(found)} tokens; expected sizes that add up to the "
                f"text's {n}."
            )
        if (sizes != n).any():
            raise ValueError(
                "chunk_sizes cuts all sequences alike, but lengths differ; read them one by one."
            )
        return found
