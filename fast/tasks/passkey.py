"""The pass key: a number hidden in a long text, to be given back at its end.

Two variants. "published" is the task of landmark attention (arXiv 2305.16300) in its five parts
and wording: a task description, filler, the key's sentence, filler, the question. "prose" hides
the same sentence in real text, among distractor sentences of the same form that hold other
numbers. Text is bytes, and a byte is a token.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DESCRIPTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
INFORMATION = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {key}.\n"

LARGEST_KEY = 50000
"""Keys are drawn from 1 to this, as published."""

DISTRACTOR = "The {name} is {number}. Remember it. {number} is the {name}."
DISTRACTOR_NAMES = (
    "page number", "door code", "locker number", "flight number", "room key", "order number",
    "pass mark", "house number", "phone number", "ticket number", "bus pass", "serial number",
    "area code", "car key", "mountain pass", "piano key", "invoice number", "port number",
    "street number", "access code", "key ring", "line number", "passage count", "zip code",
)  # fmt: skip

DISTRACTOR_SPACING = 1500
"""Mean bytes between two distractors in the prose variant."""

VARIANTS = ("published", "prose")


def encode(text: str | bytes) -> np.ndarray:
    """Bytes of a text as token ids, [n] int64 in [0, 256)."""
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, dtype=np.uint8).astype(np.int64)


def read_haystack(path: str | Path | None = None, split: str = "test") -> bytes:
    """Real text to hide a key in.

    Args:
        path: a text file; None is the Python language reference that every CPython carries in
            `pydoc_data`, of which every fifth topic is "test" and the rest "train".
        split: "train" or "test"; a file has no split.

    Returns:
        The text, UTF-8.

    Raises:
        ValueError: the file is too short to cut pieces from.
    """
    if path is not None:
        text = Path(path).read_bytes()
    else:
        from pydoc_data.topics import topics

        chosen = [i % 5 == 0 for i in range(len(topics))]
        keep = split == "test"
        names = [name for name, test in zip(sorted(topics), chosen, strict=True) if test == keep]
        text = "\n".join(topics[name] for name in names).encode()
    if len(text) < 1000:
        raise ValueError(f"the haystack has {len(text)} bytes; give at least 1,000.")
    return text


def prose(length: int, haystack: bytes, rng: np.random.Generator, spacing: float) -> bytes:
    """A piece of real text with distractors between its lines.

    Args:
        length: bytes to make.
        haystack: text to cut from, repeated where it is shorter.
        rng: source of the start, the distractors and their places.
        spacing: mean bytes between two distractors.

    Returns:
        Exactly `length` bytes.
    """
    at = int(rng.integers(len(haystack)))
    pieces, made = [], 0
    while made < length:
        span = int(rng.exponential(spacing)) + 1
        end = haystack.find(b" ", (at + span) % len(haystack))
        end = len(haystack) if end < 0 else end
        at %= len(haystack)
        piece = haystack[at:end] if end > at else haystack[at:] + haystack[:end]
        name = DISTRACTOR_NAMES[rng.integers(len(DISTRACTOR_NAMES))]
        number = int(rng.integers(1, LARGEST_KEY + 1))
        piece += b" " + DISTRACTOR.format(name=name, number=number).encode()
        pieces.append(piece)
        made += len(piece)
        at = end
    return b"".join(pieces)[:length]


@dataclass(frozen=True)
class Example:
    """One text with its key."""

    text: bytes
    """Everything up to and with the question."""

    key: int
    """The number to give back."""

    key_end: int
    """Bytes up to the end of the key's sentence."""


def make_example(
    length: int,
    depth: float,
    rng: np.random.Generator,
    haystack: bytes | None = None,
    spacing: float = DISTRACTOR_SPACING,
) -> Example:
    """One text of the task.

    Args:
        length: bytes of the whole text.
        depth: where the key is, from 0 (right after the description) to 1 (before the question).
        rng: source of the key, and of prose and distractors.
        haystack: None for the published filler, else text for the prose variant.
        spacing: mean bytes between two distractors in the prose variant.

    Returns:
        The example, whose text has exactly `length` bytes.

    Raises:
        ValueError: depth outside [0, 1], or a length too short for the five parts.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}; expected a number from 0 to 1.")
    key = int(rng.integers(1, LARGEST_KEY + 1))
    parts = [DESCRIPTION.encode(), INFORMATION.format(key=key).encode(), QUESTION.encode()]
    room = length - sum(map(len, parts)) - 4  # four line breaks
    if room < 0:
        raise ValueError(
            f"length is {length} bytes; the task's fixed parts need {length - room}."
        )
    before = round(depth * room)
    if haystack is None:
        filler = FILLER.encode() * (room // len(FILLER) + 1)
        prefix, suffix = filler[:before], filler[: room - before]
    else:
        prefix = prose(before, haystack, rng, spacing)
        suffix = prose(room - before, haystack, rng, spacing)
    head = b"\n".join([parts[0], prefix, parts[1]])
    return Example(b"\n".join([head, suffix, parts[2]]), key, len(head))


def first_number(answer: bytes) -> int | None:
    """The first number in an answer, or None: what is compared with the key."""
    found = re.search(rb"\d+", answer)
    return int(found.group()) if found else None
