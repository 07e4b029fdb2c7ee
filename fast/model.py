"""The model around the stream, in PyTorch: twin of `reference/model.py`, and `CoMeTModel`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.config import CoMeTConfig, MemoryConfig
from reference.parameters import map_parameters, shapes

from .arrays import FLOATS, dtype_name, shown, to_host
from .cells import Recompute, recompute, run_layers
from .checkpoints import check_weights, load_checkpoint, save_checkpoint
from .compiling import untraced
from .diagonal import stack_layers
from .inputs import (
    IGNORE,
    MOST_STREAMS,
    check_call,
    check_choice,
    check_chunk_sizes,
    check_count,
    check_flag,
    check_kind,
    check_labels,
    check_logits,
    check_sampling,
    check_state,
    check_stop_ids,
    check_watchers,
)
from .layers import Weights, linear, rms_norm, take_slots, tensor_of, widen
from .parameters import ParameterTree, initialize
from .recorder import Recorder
from .rereading import Rereader
from .rows import Row
from .sampling import sample
from .state import CoMeTState
from .stream import Reading, close_chunk, join, new_state, read

__all__ = [
    "IGNORE",
    "CoMeTGeneration",
    "CoMeTModel",
    "CoMeTOutput",
    "CoMeTWindow",
    "for_gradients",
    "language_loss",
    "predict",
    "score_round",
    "shift_labels",
    "sum_of_losses",
]


SCORED = 256
"""Tokens whose logits are held at once, where they are computed again in the backward pass."""

KINDS = 64
"""Kinds of rounds that are compiled, at most: they differ in what starts, ends and is asked for, and in
whether there are gradients."""

RECOMPUTE: dict[str, Recompute | None] = {
    "none": None,
    "cells": recompute,
    "chunks": recompute,
    "host": recompute,
}
"""What `recompute` of a call may be, and how the loss of a few tokens is called for it."""

_check_call, _check_logits = untraced()(check_call), untraced()(check_logits)


def predict(hidden: Tensor, params: Weights, config: CoMeTConfig) -> Tensor:
    """Logits: W rms_norm(H'), W the embedding table where tied. Twin of
    `reference.model.predict`.

    Args:
        hidden: [..., d], the top layer's output at text tokens.

    Returns:
        [..., vocab].
    """
    tied = config.backbone.tie_word_embeddings
    head = tensor_of(params["embed_tokens"]) if tied else params["lm_head"]
    return linear(rms_norm(hidden, params["norm"], config.backbone.rms_norm_eps), head)


def shift_labels(labels: Tensor, lengths: np.ndarray) -> Tensor:
    """Labels as targets of the token before them, over the whole text, before chunking.

    Args:
        labels: [b, n], a token's own id, or IGNORE.
        lengths: [b] tokens of each sequence.

    Returns:
        [b, n]: column j is the label of token j + 1; IGNORE from a sequence's last token on.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    is_last = np.arange(labels.shape[1]) >= lengths[:, None] - 1
    return targets.masked_fill(torch.from_numpy(is_last).to(labels.device), IGNORE)


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


def score_round(
    hidden: Tensor,
    row: Row,
    targets: Tensor,
    params: Weights,
    config: CoMeTConfig,
    again: Recompute | None = None,
) -> tuple[Tensor, Tensor]:
    """Of a round's labels: the sum of their losses, and how many they are.

    Args:
        hidden: [b, w, d], the top layer's output at the round's text tokens.
        row: how the round was laid out, on the device.
        targets: [b, n + 1] of the call, IGNORE in the last column, which padding reads.
        again: how the loss of a few tokens is called, so that their logits are computed again in the
            backward pass; None keeps all logits.

    Returns:
        Two scalars: nats, and an int64.
    """

    def score(hidden: Tensor, wanted: Tensor) -> Tensor:
        return sum_of_losses(predict(hidden, params, config), wanted)

    wanted = take_slots(targets, row.columns)
    predicted = wanted != IGNORE
    hidden, wanted = hidden[predicted], wanted[predicted]
    if again is None:
        return score(hidden, wanted), predicted.sum()
    nats = widen(hidden).new_zeros(())
    for tokens, labels in zip(hidden.split(SCORED), wanted.split(SCORED), strict=True):
        nats = nats + again(score, tokens, labels)
    return nats, predicted.sum()


def for_gradients(state: CoMeTState) -> CoMeTState:
    """The state as autograd takes it: it keeps no tensor that was made under inference mode, but a
    copy serves.
    """
    if not torch.is_grad_enabled():
        return state
    return state.map_tensors(lambda t: t.clone() if t.is_inference() else t)


def _check_device(device: Any) -> None:
    """Raise ValueError unless PyTorch can make a tensor there."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"device is {shown(device)}; expected one of PyTorch's that is there, e.g. 'cpu' or "
            f"'cuda' ({reason})."
        ) from error


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
    """Where the streams stand after the text."""

    logits: Tensor | None
    """[b, n, vocab] for logits="all", zero after a sequence's length; [b, 1, vocab], after each
    sequence's last token, for "last"; None for "none"."""

    loss: Tensor | None
    """Mean negative log likelihood of the labels, nats; nan if all are IGNORE; None without."""


@dataclass(frozen=True)
class CoMeTWindow:
    """One window of a text, as `windows` yields it."""

    state: CoMeTState
    """Where the streams stand after the window, detached."""

    nats: Tensor
    """Scalar: negative log likelihood, summed over the window's labels; 0 if it has none."""

    num_labels: Tensor
    """Scalar int64: labels that are predicted in the window, IGNORE left out."""

    text_labels: Tensor
    """Scalar int64: labels that are predicted in all windows of the text together."""

    @property
    def loss(self) -> Tensor:
        """The window's share of the text's loss: the shares of all windows add up to it, and so do
        their gradients. nan if all labels of the text are IGNORE.
        """
        return self.nats / self.text_labels

    @property
    def mean_loss(self) -> Tensor:
        """The window's own loss, nats per label of the window; 0 if it has none."""
        return self.nats / self.num_labels.clamp(min=1)


class CoMeTModel(nn.Module):
    """A decoder-only transformer that reads endless text in linear time and constant memory.

    `model(ids)` reads a text, `model(more, state=out.state)` reads on: however a text is split
    into calls, its logits and the state after it are the same (a call's loss leaves out the call's
    own first token). State is a value; nothing hides in the module.
    """

    def __init__(
        self,
        config: CoMeTConfig,
        weights: dict[str, Any] | None = None,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A model of given weights, or a fresh one in float32 on PyTorch's default device.

        Under `torch.device("meta")` a fresh one has names and shapes alone, in PyTorch's default
        dtype: weights that are to be filled in need not be drawn first.

        Args:
            config: the model.
            weights: nested dict of tensors under the names of `reference.parameters.shapes`,
                which the model takes over; None starts at random.
            seed: of the random start.
            device: to move the weights to; None leaves them where they are.
            dtype: to convert them to, a floating one; None keeps theirs.

        Raises:
            ValueError: weights that do not fit the config, or hold NaN or infinity; a dtype that no
                model computes in.
        """
        super().__init__()
        check_kind("config", config, CoMeTConfig, "a CoMeTConfig")
        self.config = config
        if weights is None:
            check_count("seed", seed, 0)
            if torch.empty(0).is_meta:
                weights = map_parameters(lambda _, shape: torch.empty(shape), shapes(config))
            else:
                weights = initialize(config, np.random.default_rng(seed))
        else:
            wanted = "a nested dict of tensors, or None for a fresh model"
            check_kind("weights", weights, (dict, ParameterTree), wanted)
            check_weights(weights, config)
        if device is not None:
            _check_device(device)
        if dtype is not None:
            check_kind("dtype", dtype, torch.dtype, "a dtype of PyTorch's, e.g. torch.float32")
            check_choice("dtype", str(dtype).removeprefix("torch."), FLOATS)
        with torch.inference_mode(False):  # a model that is made under it can be trained after it
            self.weights = ParameterTree(weights)
            self.to(device=device, dtype=dtype)

    _layers: Callable[..., Any] = staticmethod(run_layers)

    framework = "pt"
    """Whose tensors files are read as."""

    def place(self, array: Any) -> Tensor:
        """An array of any library on the model's device, in its dtype."""
        if not isinstance(array, Tensor):
            array = to_host(array)
            if dtype_name(array) == "bfloat16":  # which PyTorch does not take from NumPy
                array = array.astype(np.float32)
        return torch.as_tensor(array).to(self.device, self.dtype)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights["norm"].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.weights["norm"].dtype

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the layers of a round, in place: from now on calls, windows, generation and backward
        passes run what `torch.compile` makes of `cells.run_layers`, one graph for each kind of round.

        The first calls take 20 seconds to a minute: a steady stream has a few kinds of rounds, and one
        whose sizes have changed once is compiled for all sizes. Where somebody watches or
        `recompute` is "cells", layers run as written. A copy of the model is not compiled.

        Args:
            args, kwargs: those of `torch.compile`, such as `backend`, `mode` or `dynamic`.
        """
        own = {"fullgraph": True, "recompile_limit": KINDS, "isolate_recompiles": True}
        known = inspect.signature(torch.compile).parameters  # the last two are new in PyTorch
        kwargs = {name: value for name, value in own.items() if name in known} | kwargs
        self._layers = torch.compile(run_layers, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_layers", None)  # what is compiled can be neither pickled nor copied
        return state

    def new_state(self, batch_size: int = 1) -> CoMeTState:
        """The state before any text.

        Args:
            batch_size: sequences to read side by side.

        Raises:
            ValueError: batch_size below 1.
        """
        check_count("batch_size", batch_size, 1, MOST_STREAMS)
        return new_state(self.config, self.dtype, batch_size, self.device)

    def close_chunk(self, state: CoMeTState, *, recorder: Recorder | None = None) -> CoMeTState:
        """End the open chunk by hand, so that what comes next starts a chunk of its own.

        Args:
            state: where the streams stand; it is not changed.
            recorder: what watches, see `Recorder`.

        Returns:
            The state; a sequence without text since its last chunk is as it was.

        Raises:
            ValueError: the state belongs to another model.
        """
        check_state(state)
        check_watchers(recorder)
        state.check(self.config, state.batch_size, self.weights["norm"])
        return close_chunk(for_gradients(state), self.weights, self.config, recorder)

    @untraced(recursive=False)
    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        state: CoMeTState | None = None,
        logits: str = "all",
        chunk_sizes: Sequence[int] | None = None,
        backprop_chunks: int | None = None,
        *,
        recompute: str = "none",
        diagonal: bool = False,
        recorder: Recorder | None = None,
    ) -> CoMeTOutput:
        """Read text.

        For reading alone use `torch.no_grad()`: with gradients on, what a backward pass needs is
        kept, and memory grows with the text. To train on long texts, use `windows`.

        Args:
            ids: [b, n] or [n] integer token ids in [0, vocab_size), padded at the right.
            labels: as ids, a token's own id, or IGNORE where it is not predicted. They are
                shifted inside: a token is predicted from the one before it in the same call.
            lengths: [b] tokens of each sequence, 1 to n; None is n for all.
            state: where the streams stand; None starts new ones. It is not changed. One that was made
                under `torch.no_grad()` or `torch.inference_mode()` can be trained on; no gradient
                flows back through it.
            logits: "all", "last" (after each sequence's last token) or "none". What is not asked
                for is not computed.
            chunk_sizes: sizes in tokens, adding up to n, of the chunks to cut this text into,
                instead of the config's chunk size, all sequences alike. The first goes on with
                the open chunk, if there is one; the last stays open.
            backprop_chunks: gradients are cut at every so many chunk borders of a stream, counted
                from its start; None never cuts. What a loss or logits depend on is kept all the
                same: `windows` keeps one window. 1 trains nothing that writes a memory, see there.
            recompute: what is computed again in a backward pass instead of kept for it: less memory
                for more time, and the same numbers. "none": nothing. "cells": the inside of a cell,
                one layer of one chunk; its input is kept. "chunks": the inside of a chunk; the
                memories before it are kept, of queues what each chunk puts in. `backward` is
                called without `inputs` then. "host": the same, and they are kept in the host's
                memory. With any of them the logits of a loss are held for a few tokens at a time.
            diagonal: read whole chunks along diagonals, each layer one chunk ahead of the next, and so
                all layers at once: the same numbers, sooner where a model is small and texts are few.
                It begins where memories are full. Weights are copied side by side at every call, and
                top outputs are computed all, so give it long texts.
            recorder: what watches, see `Recorder`.

        Returns:
            A `CoMeTOutput`.

        Raises:
            ValueError: an argument does not fit; the message says which, and what would.
        """
        ids, state, targets, options = self._check_reading(
            *(ids, labels, lengths, state, chunk_sizes, backprop_chunks, recompute, diagonal),
            recorder,
        )
        check_choice("logits", logits, ("all", "last", "none"))
        params, config = self.weights, self.config
        outputs = logits
        if targets is not None:
            outputs = "all"
            options["finish"] = partial(self._score, targets, recompute, logits != "none")

        parts: list[Reading] = []
        last: Tensor | None = None
        nats = widen(params["norm"]).new_zeros(())
        for part in read(ids, state, params, config, outputs=outputs, recorder=recorder, **options):
            state = part.state
            if part.nats is not None:
                nats = nats + part.nats
            if logits == "all":
                parts.append(part)
            elif logits == "last":
                last = part.last(last)
        found = None
        if logits == "all":
            found = predict(join(parts, ids.shape[1]), params, config)
        elif last is not None:
            found = predict(last[:, None], params, config)
        loss = None if targets is None else nats / (targets != IGNORE).sum()
        return CoMeTOutput(state, found, loss)

    def windows(
        self,
        ids: Tensor,
        labels: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        state: CoMeTState | None = None,
        chunk_sizes: Sequence[int] | None = None,
        *,
        backprop_chunks: int,
        recompute: str = "none",
        diagonal: bool = False,
    ) -> Iterator[CoMeTWindow]:
        """Read a text of any length for training, a window of chunks at a time.

        A window is what lies between two cuts of `backprop_chunks`. It is read when it is asked
        for, so one window's graph is all that is kept, if `backward` is called as they come:

            for window in model.windows(ids, labels=ids, backprop_chunks=4):
                window.loss.backward()

        This leaves the gradients of `model(ids, labels=ids, backprop_chunks=4).loss`, added up in
        another order. To move the weights after each window, use `window.mean_loss`; what comes
        next is read with the new weights, from memories that the old ones wrote.

        Args:
            ids, labels, lengths, state, chunk_sizes: as in a call. A window's last token predicts
                the first of the next window, so only the text's own first token is not predicted.
            backprop_chunks: chunks of a window, counted from a stream's start, so that the first
                window of a stream under way may have fewer. **1 trains nothing that writes a
                memory**: the readout embeddings, the norm and the gate of the global memory, and
                the norm and the adapter of the temporary memory get no gradient, or one of zero. 2
                trains all parameters, to remember one chunk back.
            recompute, diagonal: as in a call.

        Yields:
            A `CoMeTWindow` each. In a ragged batch, those with no text left wait, as do those
            whose window is shorter.

        Raises:
            ValueError: an argument does not fit; the message says which, and what would. Raised at
                the call, before the first window.
        """
        check_count("backprop_chunks", backprop_chunks, 1)
        check_kind("labels", labels, Tensor, "a tensor like ids, such as ids itself")
        ids, state, targets, options = self._check_reading(
            ids, labels, lengths, state, chunk_sizes, backprop_chunks, recompute, diagonal
        )
        assert targets is not None  # there are labels
        options["finish"] = partial(self._score, targets, recompute, False)
        return self._windows(ids, state, targets, options)

    def _windows(
        self, ids: Tensor, state: CoMeTState, targets: Tensor, options: dict[str, Any]
    ) -> Iterator[CoMeTWindow]:
        """`windows`, its arguments checked."""
        text_labels = (targets != IGNORE).sum()
        none = widen(self.weights["norm"]).new_zeros(()), torch.zeros_like(text_labels)
        (nats, num_labels), tokens = none, state.tokens
        for part in read(ids, state, self.weights, self.config, cuts_all=True, **options):
            assert part.nats is not None  # there are labels
            assert part.num_labels is not None
            nats, num_labels = nats + part.nats, num_labels + part.num_labels
            state = part.state
            # A chunk that was full already may close before any text is read.
            if part.cut and (state.tokens > tokens).any():
                yield CoMeTWindow(state, nats, num_labels, text_labels)
                (nats, num_labels), tokens = none, state.tokens
                # autocast keeps casts of weights, which may have moved
                torch.clear_autocast_cache()
        yield CoMeTWindow(state.detach(), nats, num_labels, text_labels)

    @untraced()
    def _check_reading(
        self,
        ids: Tensor,
        labels: Tensor | None,
        lengths: Tensor | Sequence[int] | None,
        state: CoMeTState | None,
        chunk_sizes: Sequence[int] | None,
        backprop_chunks: int | None,
        recompute: str,
        diagonal: bool,
        recorder: Recorder | None = None,
    ) -> tuple[Tensor, CoMeTState, Tensor | None, dict[str, Any]]:
        """What `forward` and `windows` take, checked.

        Returns:
            ids [b, n]; the state; targets [b, n + 1], the last column for padding, or None without
            labels; options of `read`.
        """
        ids, sizes, state = check_call(self, ids, lengths, state, recorder)
        if chunk_sizes is not None:
            chunk_sizes = check_chunk_sizes(chunk_sizes, sizes, ids.shape[1])
        if backprop_chunks is not None:
            check_count("backprop_chunks", backprop_chunks, 1)
        targets = None
        if labels is not None:
            labels = check_labels(labels, ids, sizes, self.config.backbone.vocab_size)
            targets = F.pad(shift_labels(labels, sizes), (0, 1), value=IGNORE)
        check_choice("recompute", recompute, tuple(RECOMPUTE))
        rereads = recompute in ("chunks", "host")
        check_flag("diagonal", diagonal)
        if diagonal and (recompute != "none" or recorder is not None):
            other = "a recorder" if recorder is not None else f"recompute={recompute!r}"
            raise ValueError(
                f"diagonal=True with {other}, which goes chunk by chunk; give one of the two."
            )
        options: dict[str, Any] = {
            "chunk_sizes": chunk_sizes,
            "backprop_chunks": backprop_chunks,
            "lengths": sizes,
            "recompute": RECOMPUTE[recompute] if recompute == "cells" else None,
            "reread": Rereader(on_host=recompute == "host") if rereads else None,
            "layers": self._layers,
            "stacked": stack_layers(self.weights["layers"]) if diagonal else None,
        }
        return ids, for_gradients(state), targets, options

    @untraced()
    def _score(self, targets: Tensor, recompute: str, keeps: bool, part: Reading) -> Reading:
        """A round with its score, and with its top outputs or none."""
        nats, count = score_round(
            *(part.hidden, part.row, targets, self.weights, self.config), RECOMPUTE[recompute]
        )
        hidden = part.hidden if keeps else part.hidden[:, :0]
        return dataclasses.replace(part, hidden=hidden, nats=nats, num_labels=count)

    @untraced(recursive=False)
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
        recorder: Recorder | None = None,
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
            recorder: what watches, see `Recorder`.

        Returns:
            A `CoMeTGeneration`.

        Raises:
            FloatingPointError: a stream has left its dtype's range, as float16's is left at 65,504.
            ValueError: an argument does not fit; the message says which, and what would.
        """
        ids, sizes, state = _check_call(self, ids, lengths, state, recorder)
        check_count("max_new_tokens", max_new_tokens, 0)
        stop_ids = check_stop_ids(stop_ids)
        check_flag("roll", roll)
        check_sampling(temperature, top_k, top_p)
        check_watchers(recorder, on_token)
        if generator is not None:
            check_kind("generator", generator, torch.Generator, "PyTorch's, e.g. torch.Generator()")
        params, config, b = self.weights, self.config, len(ids)
        options: dict[str, Any] = {"outputs": "last", "recorder": recorder, "layers": self._layers}
        new: list[list[int]] = [[] for _ in range(b)]
        running = np.full(b, max_new_tokens > 0)
        # Where nothing depends on a token's value, a device need not be waited for until the end.
        waits = bool(stop_ids) or on_token is not None or temperature > 0.0
        steps, unseen = 0, list[tuple[Tensor, Tensor]]()
        with torch.no_grad():
            last: Tensor | None = None
            for part in read(ids, state, params, config, lengths=sizes, **options):
                last, state = part.last(last), part.state
            while running.any() and last is not None:
                logits = predict(last, params, config)  # [b, vocab]
                largest = logits.amax(dim=-1)
                if waits:
                    _check_logits(largest)
                tokens = sample(logits, temperature, top_k, top_p, generator)
                unseen.append((tokens, largest))
                take = running.astype(np.int64)
                for part in read(
                    tokens[:, None],
                    state,
                    params,
                    config,
                    roll=roll,
                    lengths=take,
                    **options,
                ):
                    last, state = part.last(last), part.state
                steps += 1
                if not waits and steps < max_new_tokens:
                    continue
                if not waits:
                    _check_logits(torch.stack([x for _, x in unseen]))
                for found in torch.stack([x for x, _ in unseen]).tolist():
                    step: list[int | None] = [
                        token if run else None for token, run in zip(found, running, strict=True)
                    ]
                    for row, token in enumerate(step):
                        if token is not None:
                            new[row].append(token)
                            running[row] = token not in stop_ids and len(new[row]) < max_new_tokens
                    if on_token is not None:
                        on_token(step)
                unseen.clear()
        return CoMeTGeneration(new, state)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each whole or not at all.

        Args:
            folder: made where it does not exist; files in it are replaced.
        """
        save_checkpoint(Path(folder), self.config, self.weights)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> CoMeTModel:
        """Read a model that `save_pretrained` wrote, or an official CoMeT checkpoint.

        Args:
            folder: with config.json and model.safetensors (or its shards and their index).
            dtype: of the weights; None is the checkpoint's.
            device: of the weights; None is the CPU.

        Returns:
            The model.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is cut short or not of this form, weights do not fit the config, or
                hold NaN or infinity.
        """
        config, weights = load_checkpoint(Path(folder))
        return cls(config, weights, device=device, dtype=dtype)

    def save_memories(self, path: str | Path) -> None:
        """Write the memories' weights alone to one safetensors file, whole or not at all, for
        `from_backbone` to read back.

        Args:
            path: an existing file is replaced.

        Raises:
            ValueError: a weight holds NaN or infinity; nothing is written.
        """
        from .pretrained.memories import save_memories

        save_memories(Path(path), self.config, self.weights)

    @classmethod
    def from_backbone(
        cls,
        source: str | Path | nn.Module,
        memory: MemoryConfig | str | Path,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        seed: int = 0,
    ) -> CoMeTModel:
        """A pretrained model with memories: fresh ones, to be trained, or trained ones.

        Args:
            source: a folder with config.json and safetensors, as Hugging Face writes it, a GGUF
                file, or a causal language model of `transformers`: Llama, Mistral, Qwen2, Qwen3,
                SmolLM2, SmolLM3.
            memory: of fresh memories; or a file that `save_memories` wrote, for those in it.
            dtype: of the weights; None is the checkpoint's, float32 for GGUF.
            device: of the weights; None is the CPU.
            seed: of fresh memories' weights.

        Returns:
            The model. Without memories, and within one chunk, it computes what the backbone does.

        Raises:
            FileNotFoundError: a file is missing.
            ImportError: a GGUF file, and the package `gguf` is not installed.
            ValueError: a file is cut short or foreign, or holds what has no place here: a sliding
                window, experts, another activation or rotation. It is named.
        """
        from .pretrained.backbones import plug_in, read_backbone
        from .pretrained.memories import load_memories, put_memories

        check_kind(
            "memory", memory, (MemoryConfig, str, Path), "a MemoryConfig, or a file of memories"
        )
        check_count("seed", seed, 0)
        if dtype is not None:
            check_kind("dtype", dtype, torch.dtype, "a dtype of PyTorch's, e.g. torch.float32")
        path = None
        if not isinstance(memory, MemoryConfig):
            path = Path(memory)
            memory = load_memories(path)[0].memory
        config, weights = plug_in(read_backbone(source), memory, dtype, seed)
        if path is not None:
            weights = put_memories(path, config, weights)
        return cls(config, weights, device=device, dtype=dtype)
