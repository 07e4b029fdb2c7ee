"""What the tasks `events` and `traces` share: logs of a small world, to the token, and questions about them.

A log is drawn entry by entry, so a million tokens take seconds, and questions are drawn of the entries
that a text holds.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..inputs import check_choice, check_count, check_kind
from .samples import Question, Sample, Words

__all__ = ["NUMBER", "Log", "fit_log"]

BLOCK = 512
"""Entries of a log that are encoded at once, at most."""

TEXTS, TRIES = 300, 50
"""Texts that are drawn until one holds all questions, and questions of a kind that are drawn in each."""

NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?!\w|\.\d)")
"""A number that stands by itself."""


def _encode_lines(lines: str, words: Words) -> list[int]:
    """The tokens of lines that stand after others."""
    # Some tokenizers put a space before a text that they are given alone.
    before, both = words.encode("\n"), words.encode(f"\n{lines}")
    is_apart = both[: len(before)] == before
    return both[len(before) :] if is_apart else words.encode(lines)


def fit_log(
    length: int, entries: Iterator[Any], banner: str, words: Words
) -> tuple[np.ndarray, list[Any]]:
    """A text of exactly so many tokens: a banner, and after it as many entries as there is room for.

    Args:
        length: in tokens.
        entries: in order, without end; `str` gives the lines of each, with their line breaks.
        banner: fills the rest, before the entries: over and over, cut at its front.
        words: what makes tokens.

    Returns:
        [length] int64, and the entries in it, all whole.
    """
    parts: list[np.ndarray] = []
    kept: list[Any] = []
    room, size = length, 4
    while True:
        size = min(2 * size, BLOCK)
        block = list(itertools.islice(entries, size))
        lines = [*map(str, block)]
        ids = _encode_lines("".join(lines), words)
        if len(ids) > room:
            break
        parts.append(np.array(ids, dtype=np.int64))
        kept += block
        room -= len(ids)

    def encode(number: int) -> list[int]:
        return _encode_lines("".join(lines[:number]), words)

    fits = bisect_right(range(len(lines)), room, lo=1, key=lambda k: len(encode(k))) - 1
    kept += block[:fits]
    parts.append(np.array(encode(fits), dtype=np.int64))
    front = np.array(_encode_lines(banner, words), dtype=np.int64)
    front = np.resize(front[::-1], room - len(parts[-1]))[::-1]
    return np.concatenate([front, *parts]), kept


@dataclass(frozen=True)
class Log:
    """A task whose text is a log of what happens in a small world, drawn entry by entry."""

    questions: int = 4
    """Asked of each text, each of them once."""

    kinds: str = "all"
    """Of the questions, with commas between them; they take turns."""

    answer_tokens: ClassVar[int]

    known: ClassVar[tuple[str, ...]]
    """Kinds of questions that there are."""

    banner: ClassVar[str]
    """What stands before the log."""

    shapes: ClassVar[tuple[re.Pattern[str], ...]]
    """What answers look like. Each has one of these."""

    def __post_init__(self) -> None:
        check_count("questions", self.questions, 1)
        check_kind("kinds", self.kinds, str, "names of kinds with commas between them, or 'all'")
        for kind in self.asked:
            check_choice("kinds", kind, ("all", *self.known))

    @property
    def asked(self) -> tuple[str, ...]:
        """Kinds of questions, in order."""
        named = dict.fromkeys(kind.strip() for kind in self.kinds.split(","))
        return self.known if "all" in named else tuple(named)

    @property
    def most_of_a_kind(self) -> int:
        """Questions of one kind in a text, at most."""
        return -(-self.questions // len(self.asked))

    def entries(self, rng: np.random.Generator) -> Iterator[Any]:
        """What happens, without end."""
        raise NotImplementedError

    def index(self, kept: list[Any]) -> Any:
        """What `ask` takes, of the entries of a text."""
        raise NotImplementedError

    def ask(self, kind: str, indexed: Any, rng: np.random.Generator) -> Question | None:
        """A question of a kind; None where the one drawn has not exactly one answer, or says it."""
        raise NotImplementedError

    def least(self, words: Words) -> int:
        """Tokens that a text takes, about."""
        raise NotImplementedError

    def draw(self, length: int, rng: np.random.Generator, words: Words) -> Sample:
        """See `Evaluation.draw`."""
        turns = [self.asked[i] for i in rng.permutation(len(self.asked))]
        kinds = list(itertools.islice(itertools.cycle(turns), self.questions))
        least = self.least(words)
        if length >= least:
            for _ in range(TEXTS):
                ids, kept = fit_log(length, self.entries(rng), self.banner, words)
                found = self._ask_all(kinds, kept, rng)
                if len(found) == len(kinds):
                    return Sample(ids, tuple(found))
            least = 2 * length
        raise ValueError(
            f"the length is {length} tokens; {self.questions} questions of the kinds {self.kinds} "
            f"take about {least}."
        )

    def _ask_all(
        self, kinds: Sequence[str], kept: list[Any], rng: np.random.Generator
    ) -> list[Question]:
        """A question of each kind, none twice; fewer where the log does not hold them."""
        found: dict[str, Question] = {}
        indexed = self.index(kept)
        for kind in kinds:
            for _ in range(TRIES):
                question = self.ask(kind, indexed, rng)
                if question is not None and question.prompt not in found:
                    found[question.prompt] = question
                    break
            else:
                break
        return [*found.values()]

    def score(self, said: str, question: Question) -> float:
        """1.0 where the first thing said that has the answer's shape is the answer."""
        right = question.answers[0]
        shape = next(shape for shape in self.shapes if shape.fullmatch(right))
        found = shape.search(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", said.lower()))
        if found is None:
            return 0.0
        same = float(found[0]) == float(right) if shape is NUMBER else found[0] == right
        return float(same)
