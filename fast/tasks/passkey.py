"""The pass key: a number hidden in a long text, to be given back at its end.

Two variants. "published" is the task of landmark attention (arXiv 2305.16300) in its five parts
and wording: a task description, filler, the key's sentence, filler, the question. "prose" hides
the same sentence in real text, among distractor sentences of the same form that hold other
numbers. Text is bytes, and a byte is a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..arrays import Array
from ..cupy_engine import CoMeTEngine
from ..files import check_regular
from ..model import CoMeTModel
from ..state import CoMeTState

DESCRIPTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
    "them. I will quiz you about the important information there."
)
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
INFORMATION = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {key}.\n"

LARGEST_KEY = 50000
"""Keys are drawn from 1 to this, as published."""

HELD_OUT = 11
"""Multiples of this are the numbers of the "test" split: training draws its keys and
distractors from all others."""

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

SHIPPED = Path(__file__).parent / "passkey_model"
"""Folder of the model that comes with the package."""


def encode(text: str | bytes) -> np.ndarray:
    """Bytes of a text as token ids, [n] int64 in [0, 256)."""
    data = text.encode() if isinstance(text, str) else text
    return np.frombuffer(data, dtype=np.uint8).astype(np.int64)


def read_haystack(path: str | Path | None = None, split: str = "test") -> bytes:
    """Real text to hide a key in.

    Args:
        path: a text file; None is the Python language reference that every CPython carries in
            `pydoc_data`. Four topics in five are "train"; "test" are the paragraphs of the others
            that stand nowhere in "train", since topics repeat each other.
        split: "train" or "test"; a file has no split.

    Returns:
        The text, UTF-8.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is too short to cut pieces from, or no regular file: it is read several times.
    """
    if path is not None:
        check_regular(Path(path))
        text = Path(path).read_bytes()
    else:
        from pydoc_data.topics import topics

        names = sorted(topics)
        kept = "\n".join(topics[name] for i, name in enumerate(names) if i % 5)
        if split == "test":
            paragraphs = [part for name in names[::5] for part in topics[name].split("\n\n")]
            kept = "\n\n".join(part for part in paragraphs if part not in kept)
        text = kept.encode()
    if len(text) < 1000:
        raise ValueError(f"the haystack has {len(text)} bytes; give at least 1,000.")
    return text


def draw_number(rng: np.random.Generator, split: str) -> int:
    """A key or a distractor's number, evenly from 1 to `LARGEST_KEY`.

    Args:
        rng: source of randomness.
        split: "test", a multiple of `HELD_OUT`; or "train", any other number.

    Returns:
        The number.
    """
    held_out = LARGEST_KEY // HELD_OUT
    if split == "test":
        return HELD_OUT * int(rng.integers(1, held_out + 1))
    n = int(rng.integers(LARGEST_KEY - held_out))
    return n + n // (HELD_OUT - 1) + 1


def filler(length: int) -> Iterator[bytes]:
    """The published filler, over and over: pieces of `length` bytes in all."""
    block = FILLER.encode() * 64
    for start in range(0, length, len(block)):
        yield block[: length - start]


def prose(
    length: int, haystack: bytes, rng: np.random.Generator, spacing: float, split: str
) -> Iterator[bytes]:
    """Real text with distractors between its words.

    Args:
        length: bytes in all.
        haystack: text to cut from, a random place first; begun again where it ends.
        rng: source of the place, and of the distractors and theirs.
        spacing: mean bytes between two distractors.
        split: of the distractors' numbers, "train" or "test".

    Yields:
        Pieces of `length` bytes in all.
    """
    at = int(rng.integers(len(haystack)))
    while length > 0:
        end = haystack.find(b" ", at + int(rng.exponential(spacing)) + 1)
        end = len(haystack) if end < 0 else end
        name = DISTRACTOR_NAMES[rng.integers(len(DISTRACTOR_NAMES))]
        distractor = DISTRACTOR.format(name=name, number=draw_number(rng, split))
        piece = haystack[at:end] + b" " + distractor.encode()
        yield piece[:length]
        length -= len(piece)
        at = end % len(haystack)


@dataclass(frozen=True)
class Example:
    """One text with its key. The text is made as it is read, and can be read again."""

    length: int
    """Bytes of the text, from the description to the question."""

    depth: float
    """Where the key is: 0 right after the description, 1 right before the question."""

    seed: int
    """Source of the key, and of the prose and its distractors."""

    haystack: bytes | None = None
    """Real text for the prose variant; None is the published filler."""

    spacing: float = DISTRACTOR_SPACING
    """Mean bytes between two distractors in the prose variant."""

    split: str = "test"
    """Numbers of the key and the distractors: "train" or "test"."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.depth <= 1.0:
            raise ValueError(f"depth is {self.depth}; expected a number from 0 to 1.")
        if self._room() < 0:
            raise ValueError(
                f"length is {self.length} bytes; the task's fixed parts need "
                f"{self.length - self._room()} with this key."
            )

    @property
    def key(self) -> int:
        """The number to give back."""
        return draw_number(np.random.default_rng([self.seed, 0]), self.split)

    @property
    def key_start(self) -> int:
        """Bytes before the key's sentence."""
        return len(DESCRIPTION) + round(self.depth * self._room()) + 2

    @property
    def key_end(self) -> int:
        """Bytes up to the end of the key's sentence."""
        return self.key_start + len(INFORMATION.format(key=self.key))

    def _room(self) -> int:
        fixed = len(DESCRIPTION) + len(INFORMATION.format(key=self.key)) + len(QUESTION)
        return self.length - fixed - 4  # four line breaks

    def pieces(self) -> Iterator[bytes]:
        """The text from its start, `length` bytes in all."""
        before = round(self.depth * self._room())
        yield f"{DESCRIPTION}\n".encode()
        yield from self._hay(before, 1)
        yield f"\n{INFORMATION.format(key=self.key)}\n".encode()
        yield from self._hay(self._room() - before, 2)
        yield f"\n{QUESTION}".encode()

    def _hay(self, length: int, part: int) -> Iterator[bytes]:
        if self.haystack is None:
            return filler(length)
        rng = np.random.default_rng([self.seed, part])
        return prose(length, self.haystack, rng, self.spacing, self.split)

    def text(self) -> bytes:
        """The whole text at once."""
        return b"".join(self.pieces())


def check_length(length: int) -> None:
    """Raise ValueError unless every key can be hidden in a text of so many bytes."""
    fixed = len(DESCRIPTION) + len(INFORMATION.format(key=LARGEST_KEY)) + len(QUESTION) + 4
    if length < fixed:
        raise ValueError(f"length is {length} bytes; the task's fixed parts need up to {fixed}.")


def first_number(answer: bytes) -> int | None:
    """The first number in an answer, or None: what is compared with the key."""
    found = re.search(rb"\d+", answer)
    return int(found.group()) if found else None


def blocks(example: Example, size: int) -> Iterator[bytes]:
    """The text in blocks of `size` bytes, the last one shorter."""
    held = bytearray()
    for piece in example.pieces():
        held += piece
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)


def answers(
    model: CoMeTModel | CoMeTEngine, examples: Sequence[Example], block: int = 4096
) -> list[bytes]:
    """What a model says to the question of each text, read side by side.

    Args:
        model: byte-level, vocabulary 256, on PyTorch or on arrays.
        examples: texts of one length.
        block: bytes of each text held at a time.

    Returns:
        Up to 8 bytes of answer each, ended by a line break.

    Raises:
        ValueError: texts of several lengths.
    """
    if len({example.length for example in examples}) != 1:
        raise ValueError("the texts have several lengths; give those of one length together.")
    state: CoMeTState | None = None
    last: Array | None = None
    with torch.no_grad():
        for parts in zip(*(blocks(example, block) for example in examples), strict=True):
            if last is not None:
                state = model(last, state=state, logits="none").state
            ids = np.stack([encode(part) for part in parts])
            if isinstance(model, CoMeTModel):
                last = torch.from_numpy(ids).to(model.device)
            else:
                last = model.xp.asarray(ids, device=model.device)
        assert last is not None  # a text is never empty
        out = model.generate(last, state, max_new_tokens=8, stop_ids=(10,))
    return [bytes(ids) for ids in out.ids]


def found(model: CoMeTModel | CoMeTEngine, examples: Sequence[Example]) -> list[bool]:
    """For each text, whether the first number in the model's answer is its key."""
    said = answers(model, examples)
    return [first_number(a) == e.key for a, e in zip(said, examples, strict=True)]


def load_model(
    folder: str | Path | None = None, engine: str | None = None, dtype: str | None = None
) -> CoMeTModel | CoMeTEngine:
    """A trained model.

    Args:
        folder: of a checkpoint; None is the model that comes with the package.
        engine: the engine's library, "cupy" or "numpy"; None is PyTorch's model.
        dtype: to compute in, "bfloat16" for instance; None is the checkpoint's.
    """
    folder = SHIPPED if folder is None else Path(folder)
    if engine is None:
        return CoMeTModel.from_pretrained(folder, None if dtype is None else getattr(torch, dtype))
    return CoMeTEngine.from_pretrained(folder, library=engine, dtype=dtype)
