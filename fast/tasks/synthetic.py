"""Synthetic tasks: texts of any length whose answers are known because they were drawn.

The forms are those of RULER (arXiv 2404.06654), MQAR (arXiv 2312.04927) and BABILong (arXiv 2406.10149);
the sentences are our own. Numbers, names and places are drawn anew for each text, so nothing can be known
beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from ..inputs import check_choice, check_count
from .passkey import FILLER
from .samples import Question, Sample, Words, fit_text, read_sentences
from .scoring import contains_all

__all__ = ["TASKS", "Associations", "CommonWords", "Facts", "Needles", "Variables"]

HAYSTACKS = ("prose", "filler")
"""What things are hidden in: sentences of real text, or the same five sentences over and over."""

ADJECTIVES = (
    "amber", "ancient", "bitter", "brave", "bright", "calm", "clever", "cold", "curly", "damp", "dark",
    "deep", "dusty", "early", "empty", "faint", "famous", "fast", "fresh", "gentle", "golden", "green",
    "happy", "heavy", "hidden", "hollow", "humble", "icy", "jolly", "kind", "late", "lazy", "little",
    "lonely", "loud", "lucky", "mild", "misty", "narrow", "noble", "odd", "pale", "plain", "proud",
    "quick", "quiet", "rapid", "rare", "red", "rough", "round", "rusty", "salty", "sharp", "shy",
    "silent", "silver", "slow", "small", "smooth", "soft", "steep", "sweet", "tall", "tiny", "warm",
    "wild", "wise", "young",
)  # fmt: skip
NOUNS = (
    "anchor", "apple", "arrow", "basket", "beach", "bell", "bird", "boat", "bottle", "bridge", "bucket",
    "candle", "castle", "chair", "cloud", "coat", "corn", "crown", "desk", "dragon", "drum", "eagle",
    "engine", "falcon", "feather", "field", "flute", "forest", "garden", "gate", "glove", "hammer",
    "harbour", "hill", "horse", "island", "jacket", "kettle", "ladder", "lamp", "leaf", "lion", "maple",
    "meadow", "mirror", "mountain", "needle", "ocean", "onion", "orchard", "oven", "owl", "paper",
    "pencil", "pillow", "planet", "pocket", "rabbit", "river", "rocket", "saddle", "shell", "ship",
    "spoon", "stone", "table", "tiger", "tower", "train", "violin", "wagon", "window",
)  # fmt: skip


def _names(number: int, rng: np.random.Generator) -> list[str]:
    """So many different names of two words."""
    most = len(ADJECTIVES) * len(NOUNS)
    if number > most:
        raise ValueError(f"{number} names are asked for; there are {most}.")
    drawn = rng.choice(most, number, replace=False)
    return [f"{ADJECTIVES[i // len(NOUNS)]} {NOUNS[i % len(NOUNS)]}" for i in drawn]


def _numbers(number: int, rng: np.random.Generator, digits: int) -> list[str]:
    """So many different numbers of so many digits."""
    least = 10 ** (digits - 1)
    if number > 9 * least:
        raise ValueError(
            f"{number} numbers of {digits} digits are asked for; there are {9 * least}."
        )
    found: dict[int, None] = {}
    while len(found) < number:
        found[int(rng.integers(least, 10 * least))] = None
    return [str(n) for n in found]


def _list_words(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


@dataclass(frozen=True)
class Hidden:
    """A task that hides sentences in a haystack."""

    haystack: str = "prose"
    """One of `HAYSTACKS`."""

    file: str | None = None
    """A text for the haystack "prose"; None is the language reference that CPython carries."""

    def __post_init__(self) -> None:
        check_choice("haystack", self.haystack, HAYSTACKS)

    def hide(
        self,
        length: int,
        parts: Sequence[tuple[float, str]],
        rng: np.random.Generator,
        words: Words,
    ) -> np.ndarray:
        """`fit_text` in the haystack, from a random place of it on."""
        pieces = _FILLER if self.haystack == "filler" else _sentences(self.file)
        return fit_text(length, parts, pieces, words, int(rng.integers(len(pieces))))


@cache
def _sentences(file: str | None) -> list[str]:
    return read_sentences(file)


_FILLER = [f"{sentence}. " for sentence in FILLER.strip().rstrip(".").split(". ")]


@dataclass(frozen=True)
class Needles(Hidden):
    """Numbers of names, hidden in a haystack: several names, several numbers of each, several that are
    asked for at once.

    With one of each it is the needle of RULER; more names are distractors.
    """

    keys: int = 1
    """Names in the text."""

    values: int = 1
    """Numbers of each name, each in a sentence of its own."""

    queries: int = 1
    """Names that one question asks for."""

    questions: int = 1
    """Asked of each text."""

    digits: int = 5
    """Of a number."""

    answer_tokens: ClassVar[int] = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keys", "values", "queries", "questions", "digits"):
            check_count(name, getattr(self, name), 1)
        if self.queries > self.keys:
            raise ValueError(f"queries is {self.queries}; there are {self.keys} keys to ask for.")

    def draw(self, length: int, rng: np.random.Generator, words: Words) -> Sample:
        """See `Evaluation.draw`."""
        names = _names(self.keys, rng)
        numbers = _numbers(self.keys * self.values, rng, self.digits)
        of = {name: numbers[i :: self.keys] for i, name in enumerate(names)}
        parts = [
            (float(rng.random()), f"The {name} number is {number}. ")
            for name in names
            for number in of[name]
        ]
        return Sample(
            self.hide(length, parts, rng, words),
            tuple(self._ask(of, rng) for _ in range(self.questions)),
        )

    def _ask(self, of: dict[str, list[str]], rng: np.random.Generator) -> Question:
        names = [[*of][i] for i in rng.choice(len(of), self.queries, replace=False)]
        told = _list_words([f"the {name} number" for name in names])
        if self.queries * self.values == 1:
            prompt = f"\nWhat is {told}? {told.capitalize()} is"
        else:
            prompt = f"\nWhat are all values of {told}? They are"
        return Question(prompt, tuple(number for name in names for number in of[name]))

    def score(self, said: str, question: Question) -> float:
        """Share of the numbers that are in the answer."""
        return contains_all(said, question.answers)


@dataclass(frozen=True)
class Variables(Hidden):
    """Variable tracking: one gets a number, others get its value, one from the other. Which have it?"""

    chains: int = 1
    """Of variables; a question is about one of them, and the others distract."""

    hops: int = 4
    """Assignments of a chain after its first."""

    answer_tokens: ClassVar[int] = 96

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chains", self.chains, 1)
        check_count("hops", self.hops, 0)

    def draw(self, length: int, rng: np.random.Generator, words: Words) -> Sample:
        """See `Evaluation.draw`."""
        size = self.hops + 1
        letters = [chr(ord("A") + i) for i in range(26)]
        all_names = [a + b + c for a in letters for b in letters for c in letters]
        drawn = rng.choice(len(all_names), self.chains * size, replace=False)
        names = [all_names[i] for i in drawn]
        numbers = _numbers(self.chains, rng, 5)
        parts: list[tuple[float, str]] = []
        for i, number in enumerate(numbers):
            own = names[i * size : (i + 1) * size]
            values = [number, *(f"VAR {name}" for name in own)]
            places = np.sort(rng.random(size)).tolist()
            parts += [
                (place, f"VAR {name} = {value}. ")
                for place, name, value in zip(places, own, values[:size], strict=True)
            ]
        prompt = f"\nWhich variables have the value {numbers[0]}? They are"
        asked = Question(prompt, tuple(names[:size]), f"{self.hops} hops")
        return Sample(self.hide(length, parts, rng, words), (asked,))

    def score(self, said: str, question: Question) -> float:
        """Share of the variables that are in the answer."""
        return contains_all(said, question.answers)


@dataclass(frozen=True)
class CommonWords:
    """A long list of words, of which a few are common. Which?"""

    common: int = 10
    """Common words; the question asks for all of them."""

    times: int = 30
    """How often each stands there, in a list of `reference` tokens; in proportion in others."""

    rare_times: int = 3
    """How often each other word does, likewise."""

    answer_tokens: ClassVar[int] = 160

    def __post_init__(self) -> None:
        check_count("common", self.common, 1)
        check_count("rare_times", self.rare_times, 1)
        check_count("times", self.times, self.rare_times + 1)

    def draw(self, length: int, rng: np.random.Generator, words: Words) -> Sample:
        """See `Evaluation.draw`."""
        # Each word once for its share: as many words in all as fill the text.
        nouns = [NOUNS[i] for i in rng.permutation(len(NOUNS))]
        chosen, others = nouns[: self.common], nouns[self.common :]
        if not others:
            raise ValueError(f"common is {self.common}; there are {len(NOUNS)} words in all.")
        weights = np.array([self.times] * len(chosen) + [self.rare_times] * len(others), float)
        listed = [*chosen, *others]
        per_word = np.mean([len(words.encode(f"{noun}, ")) for noun in listed])
        counts = np.floor(weights / weights.sum() * (length / per_word)).astype(int)
        if counts[-1] < 1:
            least = int(per_word * weights.sum() / self.rare_times) + 1
            raise ValueError(f"the length is {length} tokens; this task takes about {least}.")
        order = rng.permutation(np.repeat(np.arange(len(listed)), counts))
        pieces = [f"{listed[i]}, " for i in order]
        prompt = f"\nWhich {self.common} words are the most common in the list? They are"
        return Sample(fit_text(length, (), pieces, words), (Question(prompt, tuple(chosen)),))

    def score(self, said: str, question: Question) -> float:
        """Share of the words that are in the answer."""
        return contains_all(said, question.answers)


@dataclass(frozen=True)
class Associations:
    """Pairs of a letter group and a number, one after the other; then some are asked for: associative
    recall with many questions (MQAR).
    """

    pairs: int = 16
    """Different ones. Each stands once, at a random place of the text."""

    questions: int = 8
    """Asked of each text."""

    filler: str = "."
    """What stands between the pairs, over and over."""

    answer_tokens: ClassVar[int] = 4

    def __post_init__(self) -> None:
        check_count("pairs", self.pairs, 1)
        check_count("questions", self.questions, 1)

    def draw(self, length: int, rng: np.random.Generator, words: Words) -> Sample:
        """See `Evaluation.draw`."""
        letters = [chr(ord("a") + i) for i in range(26)]
        if self.pairs > 26**2:
            raise ValueError(f"pairs is {self.pairs}; there are {26**2} groups of two letters.")
        keys = [letters[i // 26] + letters[i % 26] for i in rng.choice(26**2, self.pairs, False)]
        values = [str(n) for n in rng.integers(10, 100, self.pairs)]
        parts = [(float(rng.random()), f"{k} {v};") for k, v in zip(keys, values, strict=True)]
        asked = rng.integers(self.pairs, size=self.questions)
        return Sample(
            fit_text(length, parts, [self.filler], words),
            tuple(Question(f"\n{keys[i]}", (values[i],)) for i in asked),
        )

    def score(self, said: str, question: Question) -> float:
        """1.0 where the answer is the pair's number."""
        return contains_all(said, question.answers)


PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry")
PLACES = ("attic", "bathroom", "bedroom", "cellar", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "ball", "book", "cup", "key", "lantern", "letter", "umbrella")


@dataclass(frozen=True)
class Facts(Hidden):
    """Facts of a small world, spread over a haystack: who went where, and with what.

    With one supporting fact the question is where somebody is; with two, where a thing is that somebody
    has taken along; with three, where that thing was before it was there.
    """

    supporting: int = 1
    """Facts that the answer takes: 1, 2 or 3."""

    facts: int = 12
    """In the text, at least."""

    answer_tokens: ClassVar[int] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("supporting", self.supporting, 1, 3)
        check_count("facts", self.facts, self.supporting)

    def draw(self, length: int, rng: np.random.Generator, words: Words) -> Sample:
        """See `Evaluation.draw`."""
        told, question = self._tell(rng)
        places = np.sort(rng.random(len(told))).tolist()
        parts = list(zip(places, (f"{fact}. " for fact in told), strict=True))
        return Sample(self.hide(length, parts, rng, words), (question,))

    def _tell(self, rng: np.random.Generator) -> tuple[list[str], Question]:
        """Facts in order, and a question that they answer."""

        def some(names: Sequence[str]) -> str:
            return names[int(rng.integers(len(names)))]

        told: list[str] = []
        where: dict[str, str] = {}  # of people
        holder: dict[str, str] = {}  # of things that are carried
        been: dict[str, list[str]] = {}  # the places of each thing that was taken, in order
        while True:
            moves = [("go", person) for person in PEOPLE]
            moves += [("take", thing) for thing in THINGS if where and thing not in holder]
            moves += [("drop", thing) for thing in holder]
            kind, name = moves[rng.integers(len(moves))]
            if kind == "go":
                place = some([p for p in PLACES if p != where.get(name)])
                told.append(f"{name} went to the {place}")
                where[name] = place
                for thing in (t for t, person in holder.items() if person == name):
                    been[thing].append(place)
            elif kind == "take":
                # A thing lies where it was left; one that nobody has touched lies anywhere.
                lies = been.get(name, [None])[-1]
                person = next((p for p, at in where.items() if lies in (None, at)), None)
                if person is None:
                    continue
                told.append(f"{person} took the {name}")
                holder[name] = person
                if name not in been:
                    been[name] = [where[person]]
            else:
                told.append(f"{holder.pop(name)} put down the {name}")
            if len(told) >= self.facts and (question := self._ask(where, been, some)) is not None:
                return told, question

    def _ask(
        self,
        where: dict[str, str],
        been: dict[str, list[str]],
        some: Callable[[Sequence[str]], str],
    ) -> Question | None:
        kind = f"{self.supporting} facts" if self.supporting > 1 else "1 fact"
        if self.supporting == 1:
            person = some([*where])
            return Question(f"\nWhere is {person}? {person} is in the", (where[person],), kind)
        moved = [thing for thing, places in been.items() if len(places) >= self.supporting - 1]
        if not moved:
            return None
        thing = some(moved)
        if self.supporting == 2:
            prompt = f"\nWhere is the {thing}? The {thing} is in the"
            return Question(prompt, (been[thing][-1],), kind)
        now, before = been[thing][-1], been[thing][-2]
        prompt = f"\nWhere was the {thing} before it was in the {now}? The {thing} was in the"
        return Question(prompt, (before,), kind)

    def score(self, said: str, question: Question) -> float:
        """1.0 where the answer begins with the place."""
        first = said.split(maxsplit=1)[0] if said.split() else ""
        return contains_all(first, question.answers)


TASKS = {
    "associations": Associations,
    "common-words": CommonWords,
    "facts": Facts,
    "needles": Needles,
    "variables": Variables,
}
"""By their names on the command line."""
