"""A document as a model's tokens, a piece at a time, and tokens as text.

A model reads by the tokenizer that its source carries, or bytes, where it has a vocabulary of 256 and
no tokenizer. A document is text and nothing else: what looks like a special token in it is spelled
out.

**Where a document is cut.** A piece has 16 to 32 KiB and ends after a line break, or else between a
word and the space or the punctuation mark after it. A place is taken only if a tokenizer starts anew
there: the tokens of the 100 characters before it are the first tokens of these and of the 100
characters after it, together. A piece is encoded with the characters before it, whose tokens are
dropped. So its tokens are those of the whole document, for a tokenizer that looks no further than 100
characters. Text with no such place in 16 KiB is cut anywhere, and may have other tokens there.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..checkpoints import read_json

__all__ = ["BYTES", "PIECE", "ByteText", "TokenText", "open_text"]

BYTES = 256
"""Vocabulary of a model that reads bytes."""

PIECE = 2**15
"""Bytes of a piece, at most."""

CONTEXT = 100
"""Characters to each side of a place that a tokenizer is asked about."""

TRIES = 50
"""Places of each kind that are asked about in a piece."""

PLACES = (re.compile(r"(?<=\n)(?=\S)"), re.compile(r"(?<=\w)(?= \w|[^\w\s])"))
"""Where a document may be cut, the best first: after a line break, after a word."""

TOKENIZER, GENERATION = "tokenizer.json", "generation_config.json"
"""Files of a folder."""


class ByteText:
    """Text of a model that reads bytes."""

    start: tuple[int, ...] = ()
    """Tokens before a document's first."""

    stop_ids: tuple[int, ...] = (10,)
    """Tokens that end an answer: a line break."""

    def read_piece(self, file: BinaryIO, place: int, size: int = PIECE) -> tuple[list[int], int]:
        """The tokens from a place on, and the place after them; the same again for the same place.

        Args:
            file: the document.
            place: in bytes, such as a piece before has ended at.
            size: bytes of the piece, at most.
        """
        file.seek(place)
        data = file.read(size)
        return list(data), place + len(data)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, none added, none special."""
        return list(text.encode())

    def prompt(self, question: str) -> list[int]:
        """The tokens of a question, to be answered after a document."""
        return self.encode(question)

    def decoder(self) -> Callable[[int], str]:
        """A function that takes token after token, and gives the text that each completes."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        return lambda token: decode(bytes([token]))


class TokenText:
    """Text of a model with a tokenizer.

    Args:
        tokenizer: of transformers.
        stop_ids: tokens that end an answer, besides the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...] = ()) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.stop_ids = stop_ids if own is None else (own, *stop_ids)
        first = tokenizer("").input_ids
        self.start = tuple(i for i in first if i == tokenizer.bos_token_id)

    def encode(self, text: str) -> list[int]:
        """As `ByteText.encode`."""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(text, **options).input_ids

    def read_piece(self, file: BinaryIO, place: int, size: int = PIECE) -> tuple[list[int], int]:
        """As `ByteText.read_piece`; a piece is a few hundred bytes longer, where the file ends.

        Raises:
            ValueError: the file is not UTF-8.
        """
        back, ahead = min(place, 4 * CONTEXT), 4 * CONTEXT  # bytes of characters, at most
        file.seek(place - back)
        before = file.read(back).decode(errors="ignore")[-CONTEXT:]
        data = file.read(size + ahead)
        is_last = len(data) < size + ahead
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(data, is_last)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file.name} is not UTF-8 at byte {place + error.start}; convert it first, for "
                "instance with iconv."
            ) from error
        if not is_last:
            text = text[: self._end(text, len(data[:size].decode(errors="ignore")))]
        end = place + len(text.encode())
        if place == 0:
            text = text.removeprefix("\ufeff")  # a mark of UTF-8, and no text
        return self._after(before, text) or self.encode(text), end

    def _after(self, before: str, text: str) -> list[int]:
        """The tokens of a text after some characters; none where these get other tokens by it."""
        tokens = self.encode(before)
        both = self.encode(before + text)
        return both[len(tokens) :] if both[: len(tokens)] == tokens else []

    def _end(self, text: str, most: int) -> int:
        """Where a piece of at most so many characters ends, by the rule at the top."""
        for kind in PLACES:
            found = [match.start() for match in kind.finditer(text, most // 2, most)]
            for end in itertools.islice(reversed(found), TRIES):
                before, after = text[max(end - CONTEXT, 0) : end], text[end : end + CONTEXT]
                if self._after(before, after):
                    return end
        return most

    def prompt(self, question: str) -> list[int]:
        """As `ByteText.prompt`; by the chat template, where the tokenizer has one."""
        if not self.tokenizer.chat_template:
            return self.encode(question)
        chat = [{"role": "user", "content": question}]
        ids = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids
        has_start = self.start and tuple(ids[: len(self.start)]) == self.start
        return ids[len(self.start) :] if has_start else ids  # which the document has begun with

    def decoder(self) -> Callable[[int], str]:
        """As `ByteText.decoder`; special tokens are no text."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.tokenizer.backend_tokenizer, token) or ""


def open_text(source: Path, vocab_size: int) -> ByteText | TokenText:
    """How a model's text becomes tokens.

    Args:
        source: the model's folder, with tokenizer.json and what else transformers' `save_pretrained`
            writes beside it, or its GGUF file.
        vocab_size: of the model.

    Raises:
        FileNotFoundError: the folder has no tokenizer, and the model does not read bytes.
        ImportError: the package `transformers` is not installed.
        ValueError: the tokenizer is not readable, or of another model.
    """
    if not source.is_file() and not (source / TOKENIZER).exists():
        if vocab_size == BYTES:
            return ByteText()
        raise FileNotFoundError(
            f"{source / TOKENIZER} is missing; put the tokenizer of the model's backbone into its "
            "folder, by transformers' tokenizer.save_pretrained(folder)."
        )
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ModuleNotFoundError as error:
        raise ImportError(
            f"to read with the tokenizer of {source} takes the package transformers, which is not "
            'installed; run pip install "comet-memory[pretrained]".'
        ) from error
    try:
        if source.is_file():
            tokenizer = AutoTokenizer.from_pretrained(
                source.parent,
                gguf_file=source.name,
                local_files_only=True,
                trust_remote_code=False,
            )
        else:  # tokenizer.json says it all, whichever class its maker gave it
            tokenizer = PreTrainedTokenizerFast.from_pretrained(source, local_files_only=True)
    except Exception as error:  # a damaged file raises anything
        raise ValueError(f"{source} has no readable tokenizer ({error!r}); is it whole?") from error
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if size > vocab_size:
        raise ValueError(
            f"the tokenizer of {source} has {size} tokens, the model's vocabulary {vocab_size}; it "
            "is of another model, so put the right one in its place."
        )
    return TokenText(tokenizer, tuple(_stop_ids(source, vocab_size)))


def _stop_ids(source: Path, vocab_size: int) -> Iterator[int]:
    """Tokens that end an answer, as a folder tells them."""
    if (source / GENERATION).is_file():
        told = read_json(source / GENERATION).get("eos_token_id")
        for token in told if isinstance(told, list) else [told]:
            if type(token) is int and token in range(vocab_size):
                yield token
