"""Train on text: each token is predicted from those before it.

A batch is texts of one length, cut at random places out of the files; or chats, packed. A text is read
window by window, so that memory stays that of a window, and is cut into chunks as the config says or as
the published training mixes its cuts.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from reference.chunking import at_boundaries, fixed_size, random_sizes, right_aligned, uniform

from ..inputs import IGNORE, MOST
from ..model import CoMeTModel, CoMeTWindow
from ..pretrained.text import ByteText, open_text
from ..train.settings import Settings
from ..train.trainer import Processes, Task
from .chats import Labelled, encode_chat, pack, read_chats
from .memories import HELD_OUT, read_tokens, split_tokens

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from ..parallel import Pipeline

__all__ = ["Batch", "Options", "Text", "at_stride", "draw_cut", "draw_stride"]

BOUNDARIES = ("<|im_end|>", "\n", "\n\n", ".", ",", "。")
"""What a chunk may end with, where one token says it: the published choice."""

SHORTEST = 4
"""Tokens of a chunk, at least, where its size is drawn: the published choice."""

CUTS = ("fixed", "published")
"""How a text is cut into chunks: as streaming does, or by `draw_cut`."""

MIXES: tuple[tuple[float, dict[str, float]], ...] = (
    (0.0, {"fixed": 0.8, "right": 0.1, "random": 0.1}),
    (1.0, {"fixed": 0.6, "right": 0.1, "random": 0.2, "uniform": 0.05, "boundaries": 0.05}),
    (0.75, {"fixed": 0.6, "right": 0.1, "uniform": 0.2, "random": 0.1}),
)
"""The published shares of the cuts: of texts shorter than a chunk, of those shorter than three quarters
of the longest, and of the others."""

EVALUATED = 16
"""Texts that are held out and read, at most."""


@dataclass(frozen=True)
class Options:
    """Of the task."""

    chunks: int = 8
    """Chunks of the longest text."""

    fewest: int | None = None
    """A batch's length is drawn evenly from so many chunks' to the longest; None: all are as long."""

    backprop_chunks: int | None = None
    """Chunks of a window; None is the whole text. 1 trains nothing that writes a memory."""

    each_window: bool = False
    """Whether the weights move after each window, not after each batch."""

    cuts: str = "fixed"
    """How a text is cut into chunks: "fixed" or "published"."""

    strides: tuple[int, ...] = ()
    """Compression strides, one of which is drawn for each batch, the first ones more often, as in the
    published training; empty is the config's."""

    def __post_init__(self) -> None:
        for name in ("chunks", "fewest", "backprop_chunks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; expected at least 1.")
        if self.fewest is not None and self.fewest > self.chunks:
            raise ValueError(f"fewest is {self.fewest}, more than chunks, {self.chunks}.")
        if self.cuts not in CUTS:
            raise ValueError(f"cuts is {self.cuts!r}; expected one of {', '.join(CUTS)}.")
        if any(stride < 1 for stride in self.strides):
            raise ValueError(f"strides are {list(self.strides)}; expected each at least 1.")


def draw_stride(strides: Sequence[int], rng: np.random.Generator) -> int:
    """One of some strides; of k, the i-th with a weight of (k - i)^2, as in the published training."""
    weights = np.arange(len(strides), 0, -1.0) ** 2
    return int(rng.choice(strides, p=weights / weights.sum()))


def draw_cut(
    ids: Sequence[int],
    longest: int,
    chunk_size: int,
    boundary_ids: Collection[int],
    rng: np.random.Generator,
) -> list[int]:
    """A text's chunk sizes by one of the five cuts, drawn by the published shares.

    Args:
        ids: of the text.
        longest: tokens of the longest text; a multiple of chunk_size.
        chunk_size: tokens of a chunk, at most.
        boundary_ids: tokens that a chunk may well end with.
        rng: source of the choices.

    Returns:
        Chunk sizes, in tokens.
    """
    n, most = len(ids), longest // chunk_size
    kind = 0 if n < chunk_size else 1 if n < 0.75 * longest else 2
    shares = MIXES[kind][1]
    name = rng.choice(list(shares), p=list(shares.values()))
    if name == "right":
        return right_aligned(n, chunk_size)
    if name == "uniform":
        return uniform(n, min(most, n))
    if -(-n // chunk_size) <= n // SHORTEST:  # else some chunk would be shorter than the shortest
        if name == "random":
            return random_sizes(n, most, SHORTEST, chunk_size, rng)
        if name == "boundaries":
            return at_boundaries(ids, most, SHORTEST, chunk_size, boundary_ids)
    return fixed_size(n, chunk_size)


def at_stride(model: CoMeTModel, stride: int) -> CoMeTModel:
    """The same model, with the same weights, whose groups have another size."""
    other = copy.copy(model)
    memory = dataclasses.replace(model.config.memory, compression_stride=stride)
    other.config = dataclasses.replace(model.config, memory=memory)
    return other


@dataclass(frozen=True)
class Batch:
    """Texts of one length, read side by side."""

    ids: Tensor
    """[b, n] int64."""

    labels: Tensor
    """[b, n] int64."""

    chunk_sizes: list[int] | None
    """How they are cut; None: as the config says."""

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return int((self.labels[:, 1:] != IGNORE).sum())


class Text(Task):
    """The task.

    Raises:
        FileNotFoundError: a file is missing, or the model's tokenizer.
        ValueError: there is nothing to read, or too little.
    """

    options_class = Options
    shares_texts = True

    def __init__(self, settings: Settings, model: CoMeTModel, processes: Processes) -> None:
        super().__init__(settings, model, processes)
        if bool(settings.text) == bool(settings.chat):
            raise ValueError(
                "expected files of plain text (text), or files of chats (chat), and not both."
            )
        if settings.chat and processes.number > 1 and any(o.each_window for o in self.phases):
            raise ValueError(
                "each_window: chats have different numbers of windows, so that processes would not "
                "take the same steps; set it to false, or train in one process."
            )
        source = Path(settings.backbone or settings.model or "")
        self.words = open_text(source, model.config.backbone.vocab_size)
        chunks = max(options.chunks for options in self.phases)
        self.longest = model.config.memory.chunk_size * chunks
        ends = map(self._encode_special, BOUNDARIES)
        self.pipeline: Pipeline | None = None
        if processes.mesh is not None:
            self._begin_pipeline(processes.mesh)
        self.boundary_ids = frozenset(ids[0] for ids in ends if len(ids) == 1)
        self.prose = self.held_out_prose = np.empty(0, dtype=np.int64)
        self.chats: list[Labelled] = []
        self.held_out_chats: list[Labelled] = []
        if settings.text:
            self._read_prose()
        else:
            self._read_chats()

    def _begin_pipeline(self, mesh: DeviceMesh) -> None:
        settings, groups = self.settings, self.processes.number
        wrong = [
            name
            for name, is_there in (
                ("accumulate", settings.accumulate > 1),
                ("backprop_chunks", any(options.backprop_chunks for options in self.phases)),
                ("each_window", any(options.each_window for options in self.phases)),
                (f"chats with a batch_size other than {groups}",
                 bool(settings.chat) and settings.batch_size != groups),
            )
            if is_there
        ]  # fmt: skip
        if wrong:
            raise ValueError(
                f"pipeline is {settings.pipeline}: a text that processes share is one step, so that "
                f"there is no place for {', '.join(wrong)}."
            )
        from ..parallel import Pipeline

        self.pipeline = Pipeline(
            self.model, mesh, block=settings.block, recompute=settings.recompute
        )

    def _encode_special(self, words: str) -> list[int]:
        if isinstance(self.words, ByteText):
            return self.words.encode(words)
        return self.words.tokenizer(words, add_special_tokens=False).input_ids

    def _read_prose(self) -> None:
        parts = [split_tokens(read_tokens(Path(path), self.words)) for path in self.settings.text]
        self.prose, self.held_out_prose = map(np.concatenate, zip(*parts, strict=True))
        if len(self.prose) < self.longest:
            raise ValueError(
                f"the text has {len(self.prose)} tokens to train on, fewer than the {self.longest} of "
                "one batch's texts; give more text, or fewer chunks."
            )

    def _read_chats(self) -> None:
        if isinstance(self.words, ByteText) or not self.words.tokenizer.chat_template:
            raise ValueError("to train on chats, the model's tokenizer needs a chat template.")
        chats = [
            encode_chat(self.words.tokenizer, chat)
            for path in self.settings.chat
            for chat in read_chats(Path(path))
        ]
        np.random.default_rng(self.settings.seed).shuffle(chats)
        texts = pack(chats, self.longest)
        end = len(texts) - len(texts) // HELD_OUT
        self.chats, self.held_out_chats = texts[:end], texts[end:]
        if not texts:
            raise ValueError(
                "no chat has anything that the assistant says; there is nothing to learn."
            )

    def read(
        self, number: int, rng: np.random.Generator, options: Options
    ) -> Iterator[Iterable[Tensor]]:
        """See `Task.read`. Texts of plain prose are read side by side and have one cut; packed chats
        have their own lengths and cuts, and are read one by one.
        """
        model = (
            at_stride(self.model, draw_stride(options.strides, rng))
            if options.strides
            else self.model
        )
        accumulate = self.settings.accumulate
        batches = [
            batch
            for i in range(number * accumulate, (number + 1) * accumulate)
            for batch in self._draw(i, rng, options)
        ]
        if self.pipeline is not None:
            self.pipeline.model = model
            yield (
                self.pipeline.step(batch.ids, batch.labels, chunk_sizes=batch.chunk_sizes)
                for batch, _ in self._own(batches)
            )
        elif options.each_window:
            for batch, share in self._own(batches):
                for window in self._windows(model, batch, options):
                    yield [window.mean_loss * share]
        else:
            labels = sum(batch.num_labels for batch in batches)
            yield (
                window.nats / max(labels, 1)  # shorter texts of a curriculum may have none
                for batch, _ in self._own(batches)
                for window in self._windows(model, batch, options)
            )

    def _draw(self, number: int, rng: np.random.Generator, options: Options) -> list[Batch]:
        """The texts of a batch, those of all processes."""
        chunk, b = self.model.config.memory.chunk_size, self.settings.batch_size
        longest = options.chunks * chunk
        if self.chats:
            rows = [self._chat(i) for i in range(number * b, (number + 1) * b)]
            texts = [(row.ids[None, :longest], row.labels[None, :longest]) for row in rows]
        else:
            n = longest
            if options.fewest is not None:
                n = int(rng.integers(options.fewest * chunk, longest + 1))
            starts = rng.integers(len(self.prose) - n + 1, size=b)
            ids = np.stack([self.prose[start : start + n] for start in starts])
            texts = [(ids, ids)]
        device = self.model.device
        return [
            Batch(
                torch.from_numpy(ids).to(device),
                torch.from_numpy(labels).to(device),
                None
                if options.cuts == "fixed"
                else draw_cut(ids[0].tolist(), longest, chunk, self.boundary_ids, rng),
            )
            for ids, labels in texts
        ]

    def _chat(self, number: int) -> Labelled:
        """A packed text of all epochs'; each epoch has an order of its own."""
        epoch, place = divmod(number, len(self.chats))
        order = np.random.default_rng([self.settings.seed, epoch, 1]).permutation(len(self.chats))
        return self.chats[order[place]]

    def _own(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, float]]:
        """What this process reads of some batches, and its share of each one's texts."""
        for i, batch in enumerate(batches):
            if len(batch.ids) == 1:  # a text by itself goes to one process
                if i % self.processes.number == self.processes.group:
                    yield batch, 1.0
                continue
            rows = self.processes.rows(len(batch.ids))
            ids = batch.ids[rows]
            own = dataclasses.replace(batch, ids=ids, labels=batch.labels[rows])
            yield own, len(ids) / len(batch.ids)

    def _windows(self, model: CoMeTModel, batch: Batch, options: Options) -> Iterator[CoMeTWindow]:
        return model.windows(
            batch.ids,
            batch.labels,
            chunk_sizes=batch.chunk_sizes,
            backprop_chunks=options.backprop_chunks or MOST,
            recompute=self.settings.recompute,
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Nats a token over at most so many texts that are held out."""
        texts = [(text.ids, text.labels) for text in self.held_out_chats[:EVALUATED]]
        n = min(self.longest, len(self.held_out_prose))
        if n > 1:
            most = min(EVALUATED, len(self.held_out_prose) // n)
            starts = np.linspace(0, len(self.held_out_prose) - n, most, dtype=np.int64)
            texts += [(self.held_out_prose[i : i + n],) * 2 for i in starts]
        nats = number = 0.0
        for ids, wanted in texts:
            text, labels = (torch.from_numpy(x)[None].to(self.model.device) for x in (ids, wanted))
            for window in self.model.windows(text, labels, backprop_chunks=2):
                nats += window.nats.item()
                number += window.num_labels.item()
        return {"nats": nats / number} if number else {}
