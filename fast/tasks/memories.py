"""Train the memories of a pretrained backbone, which stays as it is: the task.

Each step reads a batch of texts, prose with a pass key hidden in each, and then asks for the keys. Some
passages of the prose stand there twice, so that much can be told from what is gone. Two losses: that of
every token of the prose, which teaches the memories to disturb little and to tell of what is gone; and
that of the keys' tokens, which teaches them to keep what is asked for. The gradient goes back through
the whole text. Only the memories' own weights move, so what is trained is a file of a
few megabytes (`CoMeTModel.save_memories`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import check_regular
from ..model import IGNORE, CoMeTModel
from ..pretrained.text import ByteText, TokenText, open_text
from ..train.settings import Settings
from ..train.trainer import Processes, Task
from .passkey import INFORMATION, QUESTION, draw_number

__all__ = [
    "RECIPE",
    "KeyText",
    "Memories",
    "Options",
    "hide_key",
    "read_tokens",
    "repeat_passages",
    "split_tokens",
]

RECIPE = Path(__file__).parent / "memories.toml"
"""The settings of the recipe."""

HELD_OUT = 10
"""The last tenth of a document is not trained on."""


@dataclass(frozen=True)
class Options:
    """Of the task."""

    fewest: int = 1
    """Chunks of the shortest text."""

    chunks: int = 8
    """Chunks of the longest; a batch's length is drawn evenly between the two."""

    answer_weight: float = 0.5
    """Of the loss of the key's tokens, beside that of the prose."""

    repeated: float = 0.3
    """Share of a text that is written over by passages from before."""

    passage: int = 48
    """Tokens of such a passage."""

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.chunks:
            raise ValueError(
                f"fewest is {self.fewest} and chunks {self.chunks}; expected 1 <= fewest <= chunks."
            )
        if self.passage < 1 or not 0 <= self.repeated <= 1:
            raise ValueError(
                f"passage is {self.passage} and repeated {self.repeated}; expected at least 1 token, "
                "and a share from 0 to 1."
            )


@dataclass(frozen=True)
class KeyText:
    """A text with a key in it, and the question for it. Token ids, int64."""

    text: np.ndarray
    """[n] prose, the key's sentence somewhere in it."""

    question: np.ndarray
    """[q]."""

    answer: np.ndarray
    """[a] what is to follow the question: the key."""


def read_tokens(path: Path, text: ByteText | TokenText) -> np.ndarray:
    """A document's token ids, [n] int64.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a text of the tokenizer's.
    """
    check_regular(path)
    ids: list[int] = []
    with path.open("rb") as file:
        size, place = path.stat().st_size, 0
        while place < size:
            piece, place = text.read_piece(file, place)
            ids += piece
    return np.array(ids, dtype=np.int64)


def split_tokens(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What of a document is trained on, and its last tenth, which is held out."""
    end = len(ids) - len(ids) // HELD_OUT
    return ids[:end], ids[end:]


def repeat_passages(
    prose: np.ndarray, share: float, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Prose in which some passages stand again later, in place of what was there.

    Args:
        prose: [n] token ids; they are left as they are.
        share: of the tokens that are written over, at most.
        size: tokens of a passage.
        rng: source of the places.

    Returns:
        [n].
    """
    found = prose.copy()
    for _ in range(int(share * len(prose)) // size):
        first, again = np.sort(rng.integers(len(prose) - size + 1, size=2))
        if again - first >= size:
            found[again : again + size] = found[first : first + size]
    return found


def hide_key(
    prose: np.ndarray,
    length: int,
    depth: float,
    text: Any,
    rng: np.random.Generator,
    split: str = "train",
    repeats: tuple[float, int] | None = None,
) -> KeyText:
    """A part of some prose with a pass key in it.

    Args:
        prose: token ids; the part is drawn from them.
        length: tokens of the text, the key's sentence among them.
        depth: from 0 to 1, where the sentence stands.
        text: what makes tokens, see `open_text`.
        rng: source of the part and the key.
        split: of the keys, see `draw_number`.
        repeats: share and size of `repeat_passages`; None leaves the part as it is.

    Raises:
        ValueError: the prose is shorter than the text.
    """
    key = draw_number(rng, split)
    sentence = np.array(text.encode("\n" + INFORMATION.format(key=key) + "\n"), dtype=np.int64)
    rest = length - len(sentence)
    if not 0 <= rest <= len(prose):
        raise ValueError(
            f"a text of {length} tokens needs at least {len(sentence)} for the key and "
            f"{max(rest, 0)} of prose; there are {len(prose)}. Give a longer document."
        )
    start = int(rng.integers(len(prose) - rest + 1))
    part, place = prose[start : start + rest], round(depth * rest)
    if repeats is not None:
        part = repeat_passages(part, *repeats, rng)
    asked, told = (text.encode(words) for words in ("\n" + QUESTION, f" {key}"))
    return KeyText(
        np.concatenate([part[:place], sentence, part[place:]]),
        np.array(asked, dtype=np.int64),
        np.array(told, dtype=np.int64),
    )


class Memories(Task):
    """The task: prose with a key in it, then the question.

    Raises:
        FileNotFoundError: a file is missing, or the model's tokenizer.
        ValueError: there is nothing to read, or too little.
    """

    options_class = Options

    def __init__(self, settings: Settings, model: CoMeTModel, processes: Processes) -> None:
        super().__init__(settings, model, processes)
        source = Path(settings.backbone or settings.model or "")
        self.words = open_text(source, model.config.backbone.vocab_size)
        if not settings.text:
            raise ValueError("expected files of prose to hide keys in (text).")
        parts = [split_tokens(read_tokens(Path(path), self.words))[0] for path in settings.text]
        self.prose = np.concatenate(parts)

    def read(
        self, number: int, rng: np.random.Generator, options: Options
    ) -> Iterator[Iterable[Tensor]]:
        """See `Task.read`: a batch of texts of one length, and a question after each."""
        size = self.model.config.memory.chunk_size
        length = int(rng.integers(options.fewest * size, options.chunks * size + 1))
        batch = [self._draw(length, rng, options) for _ in range(self.settings.batch_size)]
        own = batch[self.processes.rows(len(batch))]
        prose, key = self.losses(own)
        share = len(own) / len(batch)
        self.told = {"prose": prose.item(), "key": key.item(), "tokens": length * len(batch)}
        yield [(prose + options.answer_weight * key) * share]

    def _draw(self, length: int, rng: np.random.Generator, options: Options) -> KeyText:
        repeats = (options.repeated, options.passage)
        return hide_key(self.prose, length, rng.random(), self.words, rng, repeats=repeats)

    def losses(self, texts: Sequence[KeyText]) -> tuple[Tensor, Tensor]:
        """Mean negative log likelihood of the texts' tokens, and of the keys': scalars, in nats.

        Args:
            texts: of one length.
        """
        device, again = self.model.device, self.settings.recompute
        ids = torch.from_numpy(np.stack([text.text for text in texts])).to(device)
        read = self.model(ids, labels=ids, logits="none", recompute=again)
        rows = [np.concatenate([text.question, text.answer]) for text in texts]
        lengths = [len(row) for row in rows]
        asked = np.zeros((len(rows), max(lengths)), dtype=np.int64)
        labels = np.full_like(asked, IGNORE)
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            asked[i, : len(row)] = row
            labels[i, len(text.question) : len(row)] = text.answer
        answered = self.model(
            torch.from_numpy(asked).to(device),
            labels=torch.from_numpy(labels).to(device),
            lengths=lengths,
            state=read.state,
            logits="none",
            recompute=again,
        )
        assert read.loss is not None  # there are labels
        assert answered.loss is not None
        return read.loss, answered.loss
