"""Read a document into a state that is saved, and answer questions after it.

What `python -m fast read` and `ask` call. The state's file tells, in its notes, which model read what:
the model's place and memories, how far the document is read, and the digest of what was read of it.
So a reading that was cut off goes on where it was last saved, to the same bits as one that was not,
and a question finds its model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import operator
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reference.config import MemoryConfig

from .arrays import shown
from .checkpoints import read_header
from .files import check_regular, check_writable
from .inputs import check_count, check_sampling
from .machine import keep_memory, resident_memory
from .model import CoMeTModel
from .pretrained.text import PIECE, ByteText, TokenText, open_text
from .state import CoMeTState

__all__ = ["DTYPES", "MEMORY", "Mark", "Source", "ask", "noted_source", "read_document", "table"]

MEMORY = MemoryConfig(chunk_size=1024, global_memory_size=8, temporary_memory_size=256)
"""Of a backbone's memories, where they are fresh."""

DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes to read in."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from: the same source is the same model, bit by bit."""

    path: str
    """A checkpoint's folder, or a backbone's folder or GGUF file."""

    memory: MemoryConfig | str | None = None
    """A backbone's memories: of fresh ones, or the file of trained ones; None for a checkpoint, which
    has its own."""

    seed: int = 0
    """Of a backbone's fresh memories."""

    dtype: str | None = None
    """One of `DTYPES`; None is that of the files."""

    def open(self) -> tuple[CoMeTModel, ByteText | TokenText]:
        """The model, and how its text becomes tokens.

        Raises:
            ImportError: a package of the extra `pretrained` is not installed.
            OSError, ValueError: the model or its tokenizer is missing, damaged, or does not fit.
        """
        path, dtype = Path(self.path), None if self.dtype is None else getattr(torch, self.dtype)
        for place in (path, self.memory):
            if not isinstance(place, (MemoryConfig, type(None))) and not Path(place).exists():
                raise FileNotFoundError(
                    f"{place} is not there; give the model that is to read, or has read, where it is "
                    "now."
                )
        if self.memory is None:
            model = CoMeTModel.from_pretrained(path, dtype=dtype)
        else:
            model = CoMeTModel.from_backbone(path, self.memory, dtype=dtype, seed=self.seed)
        return model, open_text(path, model.config.backbone.vocab_size)


@dataclass(frozen=True)
class Mark:
    """How far a document is read, and what that has taken since its start."""

    bytes: int = 0
    """Of the document."""

    tokens: int = 0
    """That the model has read of it, and what a tokenizer puts before a text. The last ones of those
    bytes, less than a chunk, wait for the rest of it."""

    seconds: float = 0.0
    """Spent reading."""

    memory: int = 0
    """Bytes that the process held at this place."""

    state: int = 0
    """Bytes of the state's tensors at this place: more where more of a chunk is open."""

    nats: float = 0.0
    """Negative log likelihood, summed over predicted tokens."""

    predicted: int = 0
    """Tokens that were predicted: all but the first one of each piece, where the loss was asked
    for."""


def _noted(path: Path, name: str) -> dict[str, Any]:
    """What a state's file notes under a name; nothing where there is none."""
    notes = read_header(path).get("notes")
    found = notes.get(name) if isinstance(notes, dict) else None
    return found if isinstance(found, dict) else {}


def noted_source(path: Path) -> Source | None:
    """The source of the model that a state's file tells of; None where it tells of none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not readable, or tells of it in another form.
    """
    data = _noted(path, "source")
    if not data:
        return None
    try:
        source = Source(**data)
        memory = data.get("memory")
        if isinstance(memory, dict):
            memory = MemoryConfig(**memory)
        check_count("seed", source.seed, 0)
        is_known = memory is None or isinstance(memory, (MemoryConfig, str))
        if not isinstance(source.path, str) or not is_known or source.dtype not in (None, *DTYPES):
            raise ValueError(
                f"path {shown(source.path)}, memory {shown(memory)}, dtype {shown(source.dtype)}"
            )
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} tells of its model in another form ({error}); give the model by --model."
        ) from error
    return dataclasses.replace(source, memory=memory)


def _load(path: Path, model: CoMeTModel) -> CoMeTState:
    """The state of one stream that a file holds; messages name the file."""
    try:
        state = CoMeTState.load(path, model)
    except ValueError as error:
        told = str(error)
        raise error if str(path) in told else ValueError(f"{path}: {told}") from error
    if state.batch_size != 1:
        raise ValueError(f"{path} holds {state.batch_size} streams; expected one.")
    return state


def _digest(document: Path, size: int) -> Any:
    """SHA-256 of a file's first bytes, to be updated with those after them."""
    found = hashlib.sha256()
    with document.open("rb") as file:
        while size > 0 and (part := file.read(min(size, 2**20))):
            found.update(part)
            size -= len(part)
    return found


Place = tuple[Mark, list[Mark], list[int], Any]
"""How far a document is read, the marks on the way, the tokens that wait, and the digest."""


class _Reading:
    """A document on its way into a state: `step` reads a piece, `save` keeps all that it takes to
    go on.
    """

    def __init__(self, document: Path, source: Source, file: Path) -> None:
        check_regular(document)
        if not document.exists():
            raise FileNotFoundError(f"{document} is missing; expected the text to read.")
        if not document.stat().st_size:
            raise ValueError(f"{document} is empty; give a text to read.")
        check_writable(file)
        self.document, self.source, self.file = document, source, file
        place = self._place() if file.exists() else None  # told before the model is loaded
        self.model, self.text = source.open()
        keep_memory()  # from here on, so that what loading took is not kept
        self.state = self.model.new_state()
        if place is not None:
            self.state = _load(file, self.model)
        start: Place = Mark(), [], list(self.text.start), hashlib.sha256()
        self.mark, self.marks, self.waiting, self.digest = place or start

    def _place(self) -> Place:
        """How far the file's state has read the document.

        Raises:
            ValueError: it holds no place in a document, or has read another one.
        """
        told = _noted(self.file, "document")
        if not told:
            raise ValueError(
                f"{self.file} is there, and no reading to go on with; give another file to save to."
            )
        try:
            mark, marks = Mark(**told["mark"]), [Mark(**mark) for mark in told["marks"]]
            digest, name = _digest(self.document, mark.bytes), told["name"]
            waiting = [operator.index(token) for token in told["waiting"]]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self.file} tells of its reading in another form ({error}); give another file to "
                "save to."
            ) from error
        if digest.hexdigest() != told["sha256"]:
            raise ValueError(
                f"{self.file} has read {mark.bytes:,} bytes of a document named {name}, with which "
                f"{self.document} does not begin; give that document, or another file to save to."
            )
        return mark, marks, waiting, digest

    def step(self, file: Any, loss: bool, size: int, total: int) -> None:
        """Take the next piece, and read the chunks that it fills; after the last, all that is left.

        Chunks are read whole: with rows of many lengths, memory was seen to grow in bfloat16.

        Args:
            file: the document, open.
            loss: whether to predict its tokens.
            size: bytes of it, at most.
            total: bytes of the document.
        """
        begun, mark = time.perf_counter(), self.mark
        ids, end = self.text.read_piece(file, mark.bytes, size)
        if end == mark.bytes:
            raise ValueError(
                f"{self.document} has become shorter while it was read; read it again."
            )
        self.waiting += ids
        chunk = self.model.config.memory.chunk_size
        begun_chunk = int(self.state.open_tokens[0]) % chunk
        whole = (begun_chunk + len(self.waiting)) // chunk * chunk - begun_chunk
        take = len(self.waiting) if end >= total else max(whole, 0)
        nats, predicted = 0.0, take - 1 if loss and take else 0
        if take:
            tokens = torch.tensor([self.waiting[:take]], device=self.model.device)
            self.waiting = self.waiting[take:]
            with torch.no_grad():
                labels = tokens if predicted else None
                out = self.model(tokens, labels, state=self.state, logits="none")
            self.state = out.state
            nats = float(out.loss) * predicted if predicted else 0.0
        file.seek(mark.bytes)
        self.digest.update(file.read(end - mark.bytes))
        self.mark = Mark(
            bytes=end,
            tokens=int(self.state.tokens[0]),
            seconds=mark.seconds + time.perf_counter() - begun,
            memory=resident_memory(),
            state=self.state.num_bytes,
            nats=mark.nats + nats,
            predicted=mark.predicted + predicted,
        )
        if self.mark.tokens.bit_length() > mark.tokens.bit_length():
            self.marks.append(self.mark)

    def save(self) -> None:
        """Write the state and the place, in one file, whole or not at all."""
        document = {
            "name": self.document.name,
            "sha256": self.digest.hexdigest(),
            "waiting": self.waiting,
            "mark": dataclasses.asdict(self.mark),
            "marks": [dataclasses.asdict(mark) for mark in self.marks],
        }
        notes = {"source": dataclasses.asdict(self.source), "document": document}
        self.state.save(self.file, self.model, notes)


def read_document(
    document: Path,
    source: Source,
    file: Path,
    *,
    loss: bool = False,
    every: float = 60.0,
    size: int = PIECE,
) -> list[Mark]:
    """Read a document to its end, or go on where its reading was saved.

    Memory does not grow with the document: it is read, encoded and given to the model piece by
    piece.

    Args:
        document: a text; UTF-8, unless the model reads bytes.
        source: of the model.
        file: to save the state and the place in the document to; what is there already is gone on
            with.
        loss: whether to predict every token too, which takes longer.
        every: seconds between saves.
        size: bytes of a piece, at most.

    Returns:
        A mark at the first end of a piece after each power of two of tokens, and one at the end.

    Raises:
        FileNotFoundError: the document, the model or its tokenizer is missing.
        ImportError: a package of the extra `pretrained` is not installed.
        ValueError: the document is empty or not UTF-8; the model, its tokenizer or the saved state
            does not fit, or the state has read another document.
    """
    from tqdm import tqdm  # of the extra `commands`

    reading = _Reading(document, source, file)
    total, saved = document.stat().st_size, time.monotonic()
    first, begun = reading.mark, time.monotonic()
    with (
        document.open("rb") as opened,
        tqdm(total=total, initial=first.bytes, unit="B", unit_scale=True, smoothing=0.1) as bar,
    ):
        while (before := reading.mark.bytes) < total:
            reading.step(opened, loss, size, total)
            mark, now = reading.mark, time.monotonic()
            bar.update(mark.bytes - before)
            speed = (mark.tokens - first.tokens) / (now - begun)
            bar.set_postfix_str(
                f"{mark.tokens:,} tokens, {speed:,.0f} a second, {_mega(mark.memory)} MB, state "
                f"{_mega(mark.state)} MB"
            )
            if now - saved >= every and mark.bytes < total:
                reading.save()
                saved = time.monotonic()
    if not reading.mark.tokens:
        raise ValueError(f"{document} has no tokens; give a text to read.")
    if reading.mark != first:
        reading.save()
    ends = [] if reading.marks[-1:] == [reading.mark] else [reading.mark]
    return [*reading.marks, *ends]


def _mega(size: int) -> str:
    """Bytes in megabytes."""
    return f"{size / 1e6:,.0f}" if size >= 1e7 else f"{size / 1e6:.2g}"


def table(marks: list[Mark]) -> str:
    """A Markdown table of a reading: each line tells of the text since the line before."""
    lines = ["| tokens | seconds | tokens a second | memory, MB | state, MB | nats a token |"]
    lines.append("|" + " ---: |" * 6)
    for before, mark in zip([Mark(), *marks], marks, strict=False):
        seconds, predicted = mark.seconds - before.seconds, mark.predicted - before.predicted
        speed = (mark.tokens - before.tokens) / seconds if seconds else math.inf
        nats = f"{(mark.nats - before.nats) / predicted:.3f}" if predicted else "-"
        lines.append(
            f"| {mark.tokens:,} | {mark.seconds:,.1f} | {speed:,.0f} | {_mega(mark.memory)} | "
            f"{_mega(mark.state)} | {nats} |"
        )
    return "\n".join(lines)


def ask(
    file: Path,
    question: str,
    source: Source | None,
    write: Callable[[str], object],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    save: Path | None = None,
) -> None:
    """Answer a question after what a state has read. The state's file stays as it is.

    Args:
        file: of the state.
        question: put as a user's turn of the tokenizer's chat template, where it has one, else as
            it is.
        source: of the model; None is the one that the file tells of.
        write: gets the answer, part by part as it comes.
        max_new_tokens: of the answer, at most.
        temperature: 0 takes the likeliest token, as in `CoMeTModel.generate`.
        seed: of the samples, above 0.
        save: file to save the state after the answer to; None saves nothing.

    Raises:
        FileNotFoundError: the state, the model or its tokenizer is missing.
        ValueError: the question is empty, the state tells of no model, or is of another.
    """
    if not question:
        raise ValueError("the question is empty; ask something.")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the question {shown(question)} is not UTF-8; write it anew.") from error
    check_count("max_new_tokens", max_new_tokens, 1)
    check_sampling(temperature, None, None)
    source = noted_source(file) if source is None else source
    if source is None:
        raise ValueError(
            f"{file} does not tell which model it belongs to; give its folder by --model."
        )
    if save is not None:
        check_writable(save)
    model, text = source.open()
    state = _load(file, model)
    ids = text.prompt(question)
    if not ids:
        raise ValueError(f"the question {shown(question)} has no tokens; ask something.")
    decode = text.decoder()

    def tell(step: list[int | None]) -> None:
        if step[0] is not None:
            write(decode(step[0]))

    out = model.generate(
        torch.tensor([ids], device=model.device),
        state,
        max_new_tokens,
        text.stop_ids,
        temperature=temperature,
        generator=torch.Generator(model.device).manual_seed(seed),
        on_token=tell,
    )
    if save is not None:
        out.state.save(save, model, {"source": dataclasses.asdict(source)})
