"""What a model is evaluated on: texts of a given length in tokens, and questions about them.

A **task** draws samples. A **sample** is a text, and questions that are asked after it, each by itself:
none sees the others. A question has a prompt, which the model goes on from, and its right answers. The
task scores what the model says.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ..pretrained.text import ByteText, TokenText
from .passkey import read_haystack

__all__ = ["Evaluation", "Question", "Sample", "Words", "fit_text", "read_sentences"]

Words = ByteText | TokenText
"""How a model's text becomes tokens."""


@dataclass(frozen=True)
class Question:
    """Asked after a text."""

    prompt: str
    """What the model goes on from: the answer is to begin right after it."""

    answers: tuple[str, ...]
    """What is right. Whether one of them will do, or all are wanted, is the task's to say."""

    kind: str = ""
    """What scores are told apart by, beside the length: the number of steps, for instance."""


@dataclass(frozen=True)
class Sample:
    """A text, and what is asked about it."""

    ids: np.ndarray
    """[n] int64, the text's tokens."""

    questions: tuple[Question, ...]


class Evaluation(Protocol):
    """A task: a dataclass of its options."""

    @property
    def answer_tokens(self) -> int:
        """Tokens of an answer, at most. It ends with its line, if not before."""
        ...

    def draw(self, length: int, rng: np.random.Generator, words: Words) -> Sample:
        """A sample.

        Args:
            length: of the text, in tokens; at most, where texts are not made but taken.
            rng: source of all that is drawn.
            words: of the model that will read it.

        Raises:
            ValueError: a text so short cannot hold what is asked for.
        """
        ...

    def score(self, said: str, question: Question) -> float:
        """What an answer is worth, from 0 to 1."""
        ...


def read_sentences(path: str | Path | None = None, split: str = "test") -> list[str]:
    """The sentences of a text, each with the space after it, to hide things between.

    Args:
        path, split: as `passkey.read_haystack` takes them.

    Raises:
        OSError, ValueError: as there.
    """
    text = read_haystack(path, split).decode(errors="replace")
    return [
        f"{' '.join(s.split())} " for s in re.split(r"(?<=[.!?])\s+|\n\s*\n", text) if s.strip()
    ]


def fit_text(
    length: int,
    parts: Iterable[tuple[float, str]],
    pieces: Sequence[str],
    words: Words,
    start: int = 0,
) -> np.ndarray:
    """A text of exactly so many tokens: parts at their places in a haystack.

    Args:
        length: in tokens.
        parts: each with its place, from 0 at the start to 1 at the end. It stands where the first piece
            ends that reaches this place; those of one place follow each other in the order given.
        pieces: of the haystack, sentences for instance, begun again where they end. The first one is cut,
            at its front, so that the last one ends with the text.
        words: what makes tokens.
        start: the piece to begin with.

    Returns:
        [length] int64.

    Raises:
        ValueError: the parts alone are longer, or there is no haystack.
    """
    waiting = [(place, words.encode(part)) for place, part in sorted(parts, key=lambda p: p[0])]
    room = length - sum(len(part) for _, part in waiting)
    if room < 0:
        raise ValueError(
            f"the length is {length} tokens; what this task puts into a text takes {length - room}."
        )
    hay = itertools.islice(itertools.cycle(pieces), start, None)
    encoded: list[list[int]] = []
    surplus = -room
    while surplus < 0:
        piece = words.encode(next(hay, ""))
        if not piece:
            raise ValueError("the haystack has a piece without tokens, or none.")
        encoded.append(piece)
        surplus += len(piece)
    ids: list[int] = []
    laid = next_part = 0
    for piece in [*encoded, []]:
        while next_part < len(waiting) and waiting[next_part][0] * room <= laid:
            ids += waiting[next_part][1]
            next_part += 1
        ids += piece[surplus:]
        laid += len(piece[surplus:])
        surplus = max(surplus - len(piece), 0)
    return np.array(ids, dtype=np.int64)
